//! The agent's end of a pseudo-terminal.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::pty::{Winsize, openpty};
use nix::sys::termios::{LocalFlags, SetArg, Termios, tcgetattr, tcsetattr};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::executors::session::Terminal;
use crate::os::sys;

/// What programs take for granted where nobody looks.
const SIZE: Winsize = Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };

/// What the kernel gives at once, in bytes.
const LARGEST_READ: usize = 4096;

/// A pseudo-terminal: what is written to it is typed, what is read from it was printed.
#[derive(Debug)]
pub struct Pty {
    master: AsyncFd<File>,
    /// Those of a fresh terminal, less its echo.
    modes: Termios,
}

/// Makes a pseudo-terminal; the second is the end for the shell.
pub fn open() -> io::Result<(Pty, OwnedFd)> {
    let pair = openpty(Some(&SIZE), None)?;
    for end in [&pair.master, &pair.slave] {
        fcntl(end, FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))?;
    }
    fcntl(&pair.master, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    let mut modes = tcgetattr(&pair.master)?;
    modes.local_flags.remove(LocalFlags::ECHO);
    tcsetattr(&pair.master, SetArg::TCSANOW, &modes)?;
    // Read back: as the kernel tells them.
    let modes = tcgetattr(&pair.master)?;
    Ok((Pty { master: sys::watch(File::from(pair.master))?, modes }, pair.slave))
}

impl Terminal for Pty {
    fn reset_modes(&self) -> io::Result<()> {
        if tcgetattr(self.master.get_ref())? != self.modes {
            tcsetattr(self.master.get_ref(), SetArg::TCSANOW, &self.modes)?;
        }
        Ok(())
    }
}

impl AsyncRead for Pty {
    /// A terminal gives 4095 bytes a read at most, so this reads until there is no more for now.
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut ready = ready!(self.master.poll_read_ready(cx))?;
            let before = buffer.filled().len();
            let done = ready.try_io(|master| read_available(master.get_ref(), buffer));
            match done {
                Ok(done) => return Poll::Ready(done),
                Err(_would_block) if buffer.filled().len() > before => return Poll::Ready(Ok(())),
                Err(_would_block) => {}
            }
        }
    }
}

/// Fills `buffer` as far as possible; would-block once nothing more is there.
fn read_available(mut master: &File, buffer: &mut ReadBuf<'_>) -> io::Result<()> {
    while buffer.remaining() > 0 {
        let room = buffer.remaining().min(LARGEST_READ);
        match master.read(buffer.initialize_unfilled_to(room)) {
            Ok(0) => break,
            Ok(read) => buffer.advance(read),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // All other ends are closed: the end of the stream, as far as anybody cares.
            Err(error) if error.raw_os_error() == Some(nix::libc::EIO) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

impl AsyncWrite for Pty {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut ready = ready!(self.master.poll_write_ready(cx))?;
            if let Ok(done) = ready.try_io(|master| master.get_ref().write(bytes)) {
                return Poll::Ready(done);
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
