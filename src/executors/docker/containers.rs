//! The place of a Docker job: all that the job has on an engine, the guard that removes it if the agent dies,
//! and its removal at the job's end.

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
use super::watch::Guard;
use crate::executors::estate::Estate;
use crate::executors::job_mark;
use crate::ssh_access::SshAccess;
use crate::state::JobDir;

/// How many guards a place may have in all. A job that kills its guards must not keep the agent busy for
/// ever.
const MOST_GUARDS: u32 = 1000;

/// The pause after a guard was replaced.
const REPLACEMENT_PAUSE: Duration = Duration::from_millis(50);

/// All that a job has on an engine. Clones share the place.
#[derive(Clone)]
pub struct JobContainers {
    shared: Rc<Shared>,
}

struct Shared {
    /// Its name labels all containers and networks of the place.
    directory: Rc<JobDir>,
    engine: RefCell<Option<Engine>>,
    /// The id of the main container, once it was created.
    main_container: RefCell<Option<String>>,
    /// Requests that may still create something: the engine completes them even if the job was stopped.
    requests: RefCell<Vec<JoinHandle<()>>>,
    /// No new request is accepted.
    closed: Cell<bool>,
    /// SSH access to the job, which the guard closes if the agent dies.
    access: Option<SshAccess>,
    guard: RefCell<Option<Guard>>,
    /// The process group that runs on this machine for the job, such as a host setup command.
    host_group: Cell<Option<Pid>>,
}

/// The place was closed before a request began, or the request has crashed.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the job is over")]
pub struct Closed;

impl JobContainers {
    /// Returns an empty place, without a guard.
    pub fn new(directory: Rc<JobDir>, access: Option<SshAccess>) -> Self {
        let shared = Shared {
            directory,
            engine: RefCell::default(),
            main_container: RefCell::default(),
            requests: RefCell::default(),
            closed: Cell::new(false),
            access,
            guard: RefCell::default(),
            host_group: Cell::new(None),
        };
        Self { shared: Rc::new(shared) }
    }

    /// Returns the value of the label of the place's containers and networks.
    pub fn id(&self) -> &str {
        self.shared.directory.name()
    }

    /// Returns the mark of the job's processes on this machine (see [`job_mark`]).
    pub fn mark(&self) -> String {
        self.shared.directory.mark()
    }

    /// Returns the job's private directory on this machine.
    pub fn scratch(&self) -> PathBuf {
        self.shared.directory.scratch()
    }

    /// Starts the guard, which removes everything in the place if the agent dies. Errors are only logged.
    pub fn watch(&self, environment: &[(OsString, OsString)]) {
        match self.start_guard(environment) {
            Ok(end) => {
                let (place, environment) = (self.clone(), environment.to_vec());
                actix::spawn(async move { place.replace_dead_guards(end, &environment).await });
            }
            Err(error) => self.log_unguarded(&error),
        }
    }

    /// Starts a guard. The returned pipe becomes readable when the guard ends.
    fn start_guard(&self, environment: &[(OsString, OsString)]) -> io::Result<Receiver> {
        let files = self.shared.directory.files().clone();
        let estate = Estate { files, access: self.shared.access.clone() };
        let mut guard = Guard::start(estate, environment)?;
        if self.shared.engine.borrow().is_some() {
            guard.note_engine_in_use()?;
        }
        guard.set_host_group(self.shared.host_group.get())?;
        let end = guard.take_end().ok_or(io::ErrorKind::BrokenPipe)?;
        self.shared.guard.replace(Some(guard));
        Receiver::from_owned_fd(end)
    }

    /// Starts another guard whenever the job has killed the current one, up to [`MOST_GUARDS`] times.
    async fn replace_dead_guards(&self, mut end: Receiver, environment: &[(OsString, OsString)]) {
        for _ in 0..MOST_GUARDS {
            // A guard writes nothing, so this resolves when the guard ends.
            let _ = end.read_u8().await;
            if self.shared.guard.borrow().is_none() {
                return;
            }
            log::warn!(place = self.id(); "the guard of a job's containers was killed; starting another one");
            end = match self.start_guard(environment) {
                Ok(end) => end,
                Err(error) => return self.log_unguarded(&error),
            };
            sleep(REPLACEMENT_PAUSE).await;
        }
        log::error!(place = self.id(); "the guard of a job's containers was killed too often; not replacing it again");
    }

    fn log_unguarded(&self, error: &io::Error) {
        log::error!(
            place = self.id(), error:%;
            "a job's containers have no guard, and would not be removed if this agent were killed"
        );
    }

    /// Records the engine that the place is on, and tells the guard.
    pub fn set_engine(&self, engine: &Engine) {
        self.shared.engine.replace(Some(engine.clone()));
        if let Some(guard) = &mut *self.shared.guard.borrow_mut()
            && let Err(error) = guard.note_engine_in_use()
        {
            self.log_unguarded(&error);
        }
    }

    /// Records the process group that runs on this machine for the job, if any, and tells the guard.
    pub fn set_host_group(&self, group: Option<Pid>) {
        self.shared.host_group.set(group);
        if let Some(guard) = &mut *self.shared.guard.borrow_mut()
            && let Err(error) = guard.set_host_group(group)
        {
            self.log_unguarded(&error);
        }
    }

    /// Records the id of the container whose end also ends the job's shell.
    pub fn set_main_container(&self, id: &str) {
        self.shared.main_container.replace(Some(id.to_owned()));
    }

    /// Runs `work`, which creates something in this place, to its end, even if this future is dropped.
    ///
    /// The removal at the job's end waits for `work`, so that it finds what was created.
    pub async fn make<T: 'static>(
        &self,
        work: impl Future<Output = T> + 'static,
    ) -> Result<T, Closed> {
        if self.shared.closed.get() {
            return Err(Closed);
        }
        let (done, result) = oneshot::channel();
        let task = actix::spawn(async move {
            // Fails if the caller was dropped by a stop.
            let _ = done.send(work.await);
        });
        self.shared.track(task);
        result.await.map_err(|_| Closed)
    }
}

impl Shared {
    fn track(&self, request: JoinHandle<()>) {
        let mut requests = self.requests.borrow_mut();
        requests.retain(|request| !request.is_finished());
        requests.push(request);
    }

    async fn end(&self) -> Result<(), LeftBehind> {
        // Processes on this machine, such as those of host setup commands.
        if !job_mark::kill_all(&self.directory.mark()) {
            log::error!(place = self.directory.name(); "processes of a job on this machine can't be killed");
        }
        let requests: Vec<_> = self.requests.take();
        let _ = timeout(PATIENCE, join_all(requests)).await;
        let engine = self.engine.borrow().clone();
        if let Some(engine) = engine {
            let removed = remove_all(&engine, self.directory.name()).await;
            if removed.is_err() {
                // The guard goes on trying, and needs the job directory for that.
                self.directory.keep();
                drop(self.guard.take());
                return removed;
            }
        }
        self.directory.delete_secrets();
        if let Some(guard) = self.guard.take() {
            guard.call_off();
        }
        Ok(())
    }
}

impl Containment for JobContainers {
    fn kill_shell(&self) {
        let shared = Rc::clone(&self.shared);
        let (Some(engine), Some(main)) =
            (shared.engine.borrow().clone(), shared.main_container.borrow().clone())
        else {
            return;
        };
        actix::spawn(async move {
            // Fails if the container does not run, which is as good.
            let _ = engine.api.kill_container(&main, None::<KillContainerOptions>).await;
        });
    }

    /// Does nothing: the shell's foreground processes can't be identified from outside of the container.
    fn kill_foreground(&self) -> bool {
        false
    }

    /// Kills everything at once, without a grace: removing a container does not wait for its processes, and no daemon
    /// outlives it.
    fn end(&self, _: End, _: Duration) -> LocalBoxFuture<'static, Result<(), LeftBehind>> {
        self.shared.closed.set(true);
        let shared = Rc::clone(&self.shared);
        async move { shared.end().await }.boxed_local()
    }
}
