//! What the actors need from the outside world: implemented by the binary, scripted in
//! the `testing` module.
//!
//! Rules for all ports, unless a method says otherwise:
//! - Calls come from the thread of the actor that owns the port. A method that returns no future
//!   must not block for long, because it holds up every other actor of that thread.
//! - A future may be dropped at any await point, by a stop or a deadline. Its effect is then
//!   unknown, and the port's other methods must cope with either.
//! - Errors are for logs: they hold no secret (no value of a variable, no token, no URL).

mod executor;
mod log;
mod platform;

pub use self::executor::*;
pub use self::log::*;
pub use self::platform::*;
