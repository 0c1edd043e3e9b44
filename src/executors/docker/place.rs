//! Everything that a job has on an engine, and its end.

use std::cell::{Cell, RefCell};
use std::ffi::OsString;
use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use actors::ports::{Containment, End, LeftBehind};
use bollard::query_parameters::KillContainerOptions;
use futures_util::FutureExt as _;
use futures_util::future::{LocalBoxFuture, join_all};
use nix::unistd::Pid;
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe::Receiver;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use super::engine::Engine;
use super::removal::{PATIENCE, remove_all};
use super::watch::Watch;
use crate::executors::estate::Estate;
use crate::executors::job_mark;
use crate::ssh_access::SshAccess;
use crate::state::JobDir;

/// How often who watches is replaced.
const MOST_WATCHES: u32 = 1000;

/// How long to wait between two looks at what is left.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Clones are of the same place.
#[derive(Clone)]
pub struct Place {
    shared: Rc<Shared>,
}

struct Shared {
    /// Its name is what all containers and networks are marked with.
    directory: Rc<JobDir>,
    engine: RefCell<Option<Engine>>,
    /// The main container, once it is made.
    main: RefCell<Option<String>>,
    /// What was asked of the engine and is not answered yet: it does it even if nobody waits.
    asked: RefCell<Vec<JoinHandle<()>>>,
    /// Nothing may be made any more.
    closed: Cell<bool>,
    /// Taken back if the agent dies.
    access: Option<SshAccess>,
    watch: RefCell<Option<Watch>>,
    /// The process group that runs on this machine for the job, if there is one.
    group: Cell<Option<Pid>>,
}

/// The place was closed meanwhile, or its request crashed.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the job is over")]
pub struct Closed;

impl Place {
    /// One where nothing is yet.
    pub fn new(directory: Rc<JobDir>, access: Option<SshAccess>) -> Self {
        let shared = Shared {
            directory,
            engine: RefCell::default(),
            main: RefCell::default(),
            asked: RefCell::default(),
            closed: Cell::new(false),
            access,
            watch: RefCell::default(),
            group: Cell::new(None),
        };
        Self { shared: Rc::new(shared) }
    }

    /// What all that belongs to it is marked with.
    pub fn id(&self) -> &str {
        self.shared.directory.name()
    }

    /// What the processes on this machine are marked with that belong to it.
    pub fn mark(&self) -> String {
        self.shared.directory.mark()
    }

    /// Where what is private to the job may be on this machine.
    pub fn scratch(&self) -> PathBuf {
        self.shared.directory.scratch()
    }

    /// From now on what the job has goes even if the agent dies.
    pub fn watch(&self, environment: &[(OsString, OsString)]) {
        match self.start_watch(environment) {
            Ok(end) => {
                let (place, environment) = (self.clone(), environment.to_vec());
                actix::spawn(async move { place.replace_dead_watches(end, &environment).await });
            }
            Err(error) => self.unwatched(&error),
        }
    }

    /// Starts who watches. The result is readable at its end.
    fn start_watch(&self, environment: &[(OsString, OsString)]) -> io::Result<Receiver> {
        let files = self.shared.directory.files().clone();
        let estate = Estate { files, access: self.shared.access.clone() };
        let mut watch = Watch::start(estate, environment)?;
        if self.shared.engine.borrow().is_some() {
            watch.on_engine()?;
        }
        watch.group(self.shared.group.get())?;
        let end = watch.end().ok_or(io::ErrorKind::BrokenPipe)?;
        self.shared.watch.replace(Some(watch));
        Receiver::from_owned_fd(end)
    }

    /// Whoever kills the one that watches gets another one to kill.
    async fn replace_dead_watches(&self, mut end: Receiver, environment: &[(OsString, OsString)]) {
        for _ in 0..MOST_WATCHES {
            // It writes nothing: this is its end.
            let _ = end.read_u8().await;
            if self.shared.watch.borrow().is_none() {
                return;
            }
            log::warn!(place = self.id(); "who watches over a job's containers was killed, and is replaced");
            end = match self.start_watch(environment) {
                Ok(end) => end,
                Err(error) => return self.unwatched(&error),
            };
            sleep(LOOK_AGAIN).await;
        }
        log::error!(place = self.id(); "who watches over a job's containers is killed again and again");
    }

    fn unwatched(&self, error: &io::Error) {
        log::error!(place = self.id(), error:%; "a job's containers would stay if this agent were killed");
    }

    /// Where it is.
    pub fn is_on(&self, engine: &Engine) {
        self.shared.engine.replace(Some(engine.clone()));
        if let Some(watch) = &mut *self.shared.watch.borrow_mut()
            && let Err(error) = watch.on_engine()
        {
            self.unwatched(&error);
        }
    }

    /// A process group of this machine belongs to it; nothing for none.
    pub fn has_group(&self, group: Option<Pid>) {
        self.shared.group.set(group);
        if let Some(watch) = &mut *self.shared.watch.borrow_mut()
            && let Err(error) = watch.group(group)
        {
            self.unwatched(&error);
        }
    }

    /// Where the job's shell is to run.
    pub fn has_main(&self, container: &str) {
        self.shared.main.replace(Some(container.to_owned()));
    }

    /// Does `work`, which makes something in this place, to its end, even if nobody waits for it any more.
    pub async fn make<T: 'static>(
        &self,
        work: impl Future<Output = T> + 'static,
    ) -> Result<T, Closed> {
        if self.shared.closed.get() {
            return Err(Closed);
        }
        let (done, result) = oneshot::channel();
        let task = actix::spawn(async move {
            // Nobody may be waiting.
            let _ = done.send(work.await);
        });
        self.shared.note(task);
        result.await.map_err(|_| Closed)
    }
}

impl Shared {
    fn note(&self, task: JoinHandle<()>) {
        let mut asked = self.asked.borrow_mut();
        asked.retain(|task| !task.is_finished());
        asked.push(task);
    }

    async fn end(&self) -> Result<(), LeftBehind> {
        // Programs of this machine that ran for the job, such as host setup commands.
        if !job_mark::kill_all(&self.directory.mark()) {
            log::error!(place = self.directory.name(); "processes of a job on this machine can't be killed");
        }
        let asked: Vec<_> = self.asked.take();
        let _ = timeout(PATIENCE, join_all(asked)).await;
        let engine = self.engine.borrow().clone();
        if let Some(engine) = engine {
            let removed = remove_all(&engine, self.directory.name()).await;
            if removed.is_err() {
                // Who watches tries on, and needs to know what.
                self.directory.let_stay();
                drop(self.watch.take());
                return removed;
            }
        }
        self.directory.delete_secrets();
        if let Some(watch) = self.watch.take() {
            watch.call_off();
        }
        Ok(())
    }
}

impl Containment for Place {
    fn kill_shell(&self) {
        let shared = Rc::clone(&self.shared);
        let (Some(engine), Some(main)) =
            (shared.engine.borrow().clone(), shared.main.borrow().clone())
        else {
            return;
        };
        actix::spawn(async move {
            // One that does not run can't be killed, and need not.
            let _ = engine.api.kill_container(&main, None::<KillContainerOptions>).await;
        });
    }

    /// From outside of a container, the processes that its shell waits for can't be told from others.
    fn kill_foreground(&self) -> bool {
        false
    }

    /// Kills everything at once, daemons too: removing a container leaves nothing in it any time.
    fn end(&self, _: End, _: Duration) -> LocalBoxFuture<'static, Result<(), LeftBehind>> {
        self.shared.closed.set(true);
        let shared = Rc::clone(&self.shared);
        async move { shared.end().await }.boxed_local()
    }
}
