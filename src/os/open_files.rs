//! How many files this process may have open: as many as the machine allows, for many clients at once.
//! What it starts gets the limit from before, as programs that use `select` need it.

use std::io;
use std::sync::OnceLock;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::os::sys;

/// More is of no use.
const ENOUGH: u64 = 65_536;

static BEFORE: OnceLock<u64> = OnceLock::new();

/// Raises the limit. Answers the new one.
pub fn raise() -> io::Result<u64> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let raised = soft.max(hard.min(ENOUGH));
    setrlimit(Resource::RLIMIT_NOFILE, raised, hard)?;
    // Once raised, it is never raised again.
    let _ = BEFORE.set(soft);
    Ok(raised)
}

/// The limit from before it was raised, if it was.
pub fn before() -> Option<u64> {
    BEFORE.get().copied()
}

/// Has the files that this process found open be closed in what it starts, except for the standard ones.
pub fn keep_inherited_from_children() -> io::Result<()> {
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let number = entry?.file_name().to_str().and_then(|name| name.parse().ok());
        if let Some(number) = number.filter(|number| *number > 2) {
            sys::close_on_exec(number)?;
        }
    }
    Ok(())
}

/// Sets the limit, for this process and what it starts from now on.
pub fn lower_to(limit: u64) -> io::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, limit.min(hard), hard)?)
}
