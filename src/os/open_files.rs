//! The limit of open files. The agent raises its own, to serve many clients at once; the programs that it
//! starts get the original limit, because programs that use `select` fail with a high one.

use std::io;
use std::sync::OnceLock;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::os::sys;

/// Upper bound for the raised limit; the agent never needs more descriptors.
const ENOUGH: u64 = 65_536;

static BEFORE: OnceLock<u64> = OnceLock::new();

/// Raises the limit. Returns the new limit.
pub fn raise() -> io::Result<u64> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let raised = soft.max(hard.min(ENOUGH));
    setrlimit(Resource::RLIMIT_NOFILE, raised, hard)?;
    // Called only once; keep the first value in any case.
    let _ = BEFORE.set(soft);
    Ok(raised)
}

/// Returns the original limit, or `None` if the limit was not raised.
pub fn before() -> Option<u64> {
    BEFORE.get().copied()
}

/// Marks all inherited descriptors but the three standard ones as close-on-exec.
pub fn keep_inherited_from_children() -> io::Result<()> {
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let number = entry?.file_name().to_str().and_then(|name| name.parse().ok());
        if let Some(number) = number.filter(|number| *number > 2) {
            sys::close_on_exec(number)?;
        }
    }
    Ok(())
}

/// Sets the limit of this process and of the programs that it starts from now on.
pub fn lower_to(limit: u64) -> io::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, limit.min(hard), hard)?)
}
