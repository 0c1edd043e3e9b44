use super::*;
use crate::errors::WithCauses;
use crate::testing::MemorySpool;

fn output(text: &str) -> Append {
    Append { event: LogEvent::cmd_output(text) }
}

fn read(spool: &MemorySpool, range: &LogRange) -> Vec<String> {
    let bytes = spool.contents();
    let [start, end] = [range.start, range.end].map(|at| usize::try_from(at).unwrap());
    let lines = std::str::from_utf8(&bytes[start..end]).unwrap().lines();
    lines
        .map(|line| match LogEvent::decode(line.as_bytes()).unwrap() {
            LogEvent::CmdOutput { output, .. } => output,
            other => panic!("{other:?}"),
        })
        .collect()
}

#[actix::test]
async fn a_range_begins_at_any_line() {
    let spool = MemorySpool::default();
    let log = LogBuffer::new(Box::new(spool.clone()), Published::default()).start();
    let texts: Vec<String> =
        (0..1000).map(|i| format!("{i}{}", "x".repeat(i * 7 % 3000))).collect();
    for text in &texts {
        log.send(output(text)).await.unwrap().unwrap();
    }
    for line in [0, 1, 63, 64, 65, 500, 998, 999, 1000, 5000] {
        let range = log.send(ReadFrom { line: line as u64 }).await.unwrap().unwrap();
        assert_eq!(read(&spool, &range), texts[line.min(1000)..], "from line {line}");
        assert_eq!((range.next_line, range.sealed), (1000, false));
    }
}

#[actix::test]
async fn a_follower_waits_for_its_line_or_the_end() {
    let spool = MemorySpool::default();
    let log = LogBuffer::new(Box::new(spool.clone()), Published::default()).start();
    let mut waiting = Box::pin(log.send(Follow { line: 1 }));
    assert!(futures_util::poll!(&mut waiting).is_pending());
    log.send(output("a")).await.unwrap().unwrap();
    assert!(futures_util::poll!(&mut waiting).is_pending());
    log.send(output("b")).await.unwrap().unwrap();
    assert_eq!(read(&spool, &waiting.await.unwrap().unwrap()), ["b"]);

    let at_end = log.send(Follow { line: 2 });
    log.send(Seal).await.unwrap();
    let range = at_end.await.unwrap().unwrap();
    assert!(range.sealed && range.start == range.end);
    assert!(matches!(log.send(output("late")).await.unwrap(), Err(LogError::Sealed)));
}

#[actix::test]
async fn a_failed_write_leaves_no_half_line() {
    let spool = MemorySpool::default();
    let log = LogBuffer::new(Box::new(spool.clone()), Published::default()).start();
    log.send(output("a")).await.unwrap().unwrap();
    spool.fail_next_append_after(5);
    assert!(matches!(log.send(output("lost")).await.unwrap(), Err(LogError::Spool(_))));
    log.send(output("b")).await.unwrap().unwrap();
    let range = log.send(ReadFrom { line: 0 }).await.unwrap().unwrap();
    assert_eq!(read(&spool, &range), ["a", "b"]);
}

#[actix::test]
async fn a_crash_loses_nothing_that_was_published() {
    let spool = MemorySpool::default();
    let published = Published::default();
    let log = LogBuffer::new(Box::new(spool.clone()), published.clone()).start();
    for i in 0..200 {
        log.send(output(&i.to_string())).await.unwrap().unwrap();
    }
    assert!(log.send(crate::testing::PanicNow).await.is_err());
    spool.clone().append(b"{\"event\":\"cmd_out").unwrap();

    let recovered = LogBuffer::recover(Box::new(spool.clone()), published).unwrap().start();
    recovered.send(output("after")).await.unwrap().unwrap();
    let range = recovered.send(ReadFrom { line: 198 }).await.unwrap().unwrap();
    assert_eq!(read(&spool, &range), ["198", "199", "after"]);
}

#[actix::test]
async fn a_log_that_is_cut_keeps_its_number_of_lines_and_reports_the_cut_once() {
    let spool = MemorySpool::default();
    let log = LogBuffer::new(Box::new(spool.clone()), Published::default()).start();
    for i in 0..200 {
        log.send(output(&i.to_string())).await.unwrap().unwrap();
    }
    spool.cut_behind_the_writer(spool.contents().len() / 2 + 3);
    let range = log.send(ReadFrom { line: 198 }).await.unwrap().unwrap();
    assert_eq!(read(&spool, &range), ["", ""]);
    let told = log.send(output("not written")).await.unwrap();
    assert!(matches!(told, Err(LogError::Changed(ForeignChange::Cut(_)))), "{told:?}");
    log.send(output("after")).await.unwrap().unwrap();
    let all = log.send(ReadFrom { line: 0 }).await.unwrap().unwrap();
    let lines = read(&spool, &all);
    assert_eq!((lines.len(), &*lines[0], &*lines[50], &*lines[200]), (201, "0", "50", "after"));
}

#[actix::test]
async fn bytes_appended_by_another_process_are_cut_off() {
    let spool = MemorySpool::default();
    let log = LogBuffer::new(Box::new(spool.clone()), Published::default()).start();
    log.send(output("a")).await.unwrap().unwrap();
    spool.write_behind_the_writer(b"garbage");
    assert!(matches!(log.send(Check).await.unwrap(), Err(LogError::Changed(ForeignChange::Grown))));
    log.send(output("b")).await.unwrap().unwrap();
    let range = log.send(ReadFrom { line: 0 }).await.unwrap().unwrap();
    assert_eq!(read(&spool, &range), ["a", "b"]);
    assert_eq!(spool.contents().len() as u64, range.end);
}

#[actix::test]
async fn overwritten_bytes_are_reported_by_a_check_and_cost_no_line() {
    let spool = MemorySpool::default();
    let log = LogBuffer::new(Box::new(spool.clone()), Published::default()).start();
    for _ in 0..3 {
        log.send(output("text")).await.unwrap().unwrap();
    }
    log.send(Check).await.unwrap().unwrap();
    let first = memchr::memchr(b'\n', &spool.contents()).unwrap();
    spool.overwrite_behind_the_writer(first, b" ");
    let told = log.send(Check).await.unwrap();
    assert!(matches!(told, Err(LogError::Changed(ForeignChange::Overwritten))), "{told:?}");
    log.send(Check).await.unwrap().unwrap();
    let range = log.send(ReadFrom { line: 2 }).await.unwrap().unwrap();
    assert_eq!((read(&spool, &range), range.next_line), (vec![String::new()], 3));
}

#[actix::test]
async fn a_log_that_was_cut_after_a_crash_is_recovered() {
    let spool = MemorySpool::default();
    let published = Published::default();
    let log = LogBuffer::new(Box::new(spool.clone()), published.clone()).start();
    for text in ["a", "b", "c"] {
        log.send(output(text)).await.unwrap().unwrap();
    }
    assert!(log.send(crate::testing::PanicNow).await.is_err());
    spool.cut_behind_the_writer(10);
    let recovered = LogBuffer::recover(Box::new(spool.clone()), published).unwrap().start();
    assert!(matches!(recovered.send(Check).await.unwrap(), Err(LogError::Changed(_))));
    let range = recovered.send(ReadFrom { line: 0 }).await.unwrap().unwrap();
    assert_eq!((read(&spool, &range), range.next_line), (vec![String::new(); 3], 3));
}

#[actix::test]
async fn a_line_that_can_not_be_found_any_more_could_not_be_read() {
    let spool = MemorySpool::default();
    let log = LogBuffer::new(Box::new(spool.clone()), Published::default()).start();
    for _ in 0..3 {
        log.send(output("text")).await.unwrap().unwrap();
    }
    let bytes = spool.contents();
    for newline in memchr::memchr_iter(b'\n', &bytes) {
        spool.overwrite_behind_the_writer(newline, b" ");
    }
    let failed = log.send(ReadFrom { line: 2 }).await.unwrap().unwrap_err();
    assert!(matches!(failed, LogError::Unreadable(_)), "{failed:?}");
    let shown = WithCauses(&failed).to_string();
    assert!(shown.starts_with("the job's log could not be read: "), "{shown}");
}
