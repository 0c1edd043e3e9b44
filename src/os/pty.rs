//! The agent's end of a pseudo-terminal.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::pty::{Winsize, openpty};
use nix::sys::termios::{LocalFlags, SetArg, Termios, tcgetattr, tcsetattr};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::executors::session::Terminal;
use crate::os::sys;

/// The traditional terminal size, which programs expect where no person watches.
const SIZE: Winsize = Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };

/// Size of one read, in bytes; the kernel returns at most 4095.
const LARGEST_READ: usize = 4096;

/// The master end of a pseudo-terminal: writing types input, reading returns output.
#[derive(Debug)]
pub struct Pty {
    master: AsyncFd<File>,
    /// The modes of a fresh terminal, without echo.
    modes: Termios,
}

/// Opens a pseudo-terminal. Returns the agent's end and the shell's end.
pub fn open() -> io::Result<(Pty, OwnedFd)> {
    let pair = openpty(Some(&SIZE), None)?;
    for end in [&pair.master, &pair.slave] {
        fcntl(end, FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))?;
    }
    fcntl(&pair.master, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    let mut modes = tcgetattr(&pair.master)?;
    modes.local_flags.remove(LocalFlags::ECHO);
    tcsetattr(&pair.master, SetArg::TCSANOW, &modes)?;
    // Read the modes back: the kernel may report more flags than were set, and `reset_modes` compares them.
    let modes = tcgetattr(&pair.master)?;
    Ok((Pty { master: sys::watch(File::from(pair.master))?, modes }, pair.slave))
}

impl Pty {
    /// Returns another handle on the agent's end, which keeps the terminal from being closed.
    pub fn try_clone(&self) -> io::Result<OwnedFd> {
        self.master.get_ref().as_fd().try_clone_to_owned()
    }
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
    /// Reads until no more bytes are available: a single read returns at most 4095.
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

/// Fills `buffer` as far as possible; fails with `WouldBlock` once no more bytes are available.
fn read_available(mut master: &File, buffer: &mut ReadBuf<'_>) -> io::Result<()> {
    while buffer.remaining() > 0 {
        let room = buffer.remaining().min(LARGEST_READ);
        match master.read(buffer.initialize_unfilled_to(room)) {
            Ok(0) => break,
            Ok(read) => buffer.advance(read),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // EIO: all slave ends are closed, which counts as the end of the stream.
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
