//! Asks the terminal which image protocol it supports.

use std::env;

/// Protocols for images on a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Protocol {
    Kitty,
    Iterm2,
    Sixel,
}

/// The terminal's abilities.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Terminal {
    pub(super) protocol: Protocol,
    /// Width and height in pixels, if the terminal reports them.
    pub(super) pixels: Option<(usize, usize)>,
}

/// Values of `TERM` for terminals that print unknown sequences, or for no terminal.
const UNABLE: [&str; 3] = ["", "dumb", "linux"];
/// Query in kitty's protocol: one pixel that is checked and not shown.
const KITTY: &str = "\x1b_Gi=31,s=1,v=1,a=q,t=d,f=24;AAAA\x1b\\";
const KITTY_ANSWER: &str = "\x1b_Gi=31;OK";
/// Query for the terminal's name and version (XTVERSION).
const NAME: &str = "\x1b[>q";
/// Query for the primary device attributes. All terminals answer it, so it comes last.
const ATTRIBUTES: &str = "\x1b[c";

/// Width and height of a character on a terminal that does not report its pixels.
const CHARACTER: (usize, usize) = (8, 16);

impl Terminal {
    /// Asks the terminal of this process. Returns `None` if it shows no images, does not answer
    /// within two seconds, or if another job of the shell is in the foreground.
    pub(super) fn ask() -> Option<Self> {
        let is_set = |name| env::var_os(name).is_some();
        let term = env::var("TERM").unwrap_or_default();
        let apple = env::var_os("TERM_PROGRAM").is_some_and(|name| name == "Apple_Terminal");
        if UNABLE.contains(&term.as_str()) || apple {
            return None;
        }
        // tmux and screen take kitty's query for the title of the window.
        let inside = is_set("TMUX") || is_set("STY");
        let kitty = if inside { "" } else { KITTY };
        let (answer, pixels) = exchange(&[kitty, NAME, ATTRIBUTES].concat())?;
        let protocol = Protocol::from_answer(&answer)?;
        Some(Self { protocol, pixels })
    }
}

impl Protocol {
    /// The best protocol in a terminal's answer.
    fn from_answer(answer: &str) -> Option<Self> {
        let sequences = || answer.split('\x1b');
        let attributes = sequences()
            .find_map(|sequence| sequence.strip_prefix("[?")?.split_once('c'))
            .map_or("", |(attributes, _)| attributes);
        if answer.contains(KITTY_ANSWER) {
            Some(Self::Kitty)
        } else if sequences().any(|sequence| sequence.starts_with("P>|iTerm2")) {
            Some(Self::Iterm2)
        } else if attributes
            .split(';')
            .skip(1)
            .any(|attribute| attribute == "4")
        {
            Some(Self::Sixel)
        } else {
            None
        }
    }
}

/// Whether the answer to the last query has arrived.
#[cfg(unix)]
fn is_complete(answer: &[u8]) -> bool {
    let attributes = answer.windows(3).position(|start| start == b"\x1b[?");
    attributes.is_some_and(|start| answer[start..].contains(&b'c'))
}

/// Writes queries to the terminal. Returns its answers, and its width and height in pixels.
#[cfg(unix)]
fn exchange(question: &str) -> Option<(String, Option<(usize, usize)>)> {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::time::{Duration, Instant};

    use rustix::io::ioctl_fionread;
    use rustix::process::getpgrp;
    use rustix::termios::{
        OptionalActions, SpecialCodeIndex, Termios, Winsize, tcgetattr, tcgetpgrp, tcgetwinsize,
        tcsetattr,
    };

    const TIMEOUT: Duration = Duration::from_secs(2);

    /// Restores the terminal's settings.
    struct Restore<'a>(&'a File, Termios);

    impl Drop for Restore<'_> {
        fn drop(&mut self) {
            tcsetattr(self.0, OptionalActions::Drain, &self.1).ok();
        }
    }

    let file = File::options()
        .read(true)
        .write(true)
        .open("/dev/tty")
        .ok()?;
    let mut terminal = &file;
    // The kernel stops a job in the background that changes the settings.
    if tcgetpgrp(terminal).ok()? != getpgrp() {
        return None;
    }
    // What the user has typed belongs to the shell.
    if ioctl_fionread(terminal).ok()? > 0 {
        return None;
    }
    let size: Winsize = tcgetwinsize(terminal).ok()?;
    let pixels = match (size.ws_xpixel, size.ws_ypixel, size.ws_col, size.ws_row) {
        (_, _, 0, _) | (_, _, _, 0) => None,
        (0, _, columns, rows) | (_, 0, columns, rows) => Some((
            usize::from(columns) * CHARACTER.0,
            usize::from(rows) * CHARACTER.1,
        )),
        (width, height, _, _) => Some((width.into(), height.into())),
    };

    let settings = tcgetattr(terminal).ok()?;
    let mut raw = settings.clone();
    raw.make_raw();
    // A read waits for at most a tenth of a second.
    raw.special_codes[SpecialCodeIndex::VMIN] = 0;
    raw.special_codes[SpecialCodeIndex::VTIME] = 1;
    let _restore = Restore(terminal, settings);
    tcsetattr(terminal, OptionalActions::Drain, &raw).ok()?;
    terminal.write_all(question.as_bytes()).ok()?;

    let started = Instant::now();
    let mut answer = Vec::new();
    let mut buffer = [0; 256];
    while !is_complete(&answer) && started.elapsed() < TIMEOUT {
        let count = terminal.read(&mut buffer).ok()?;
        answer.extend_from_slice(&buffer[..count]);
    }
    Some((String::from_utf8(answer).ok()?, pixels))
}

/// Terminals on Windows are not asked.
#[cfg(not(unix))]
fn exchange(_question: &str) -> Option<(String, Option<(usize, usize)>)> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_protocol_follows_from_the_answer() {
        for (answer, expected) in [
            (
                "\x1b_Gi=31;OK\x1b\\\x1bP>|kitty(0.36.4)\x1b\\\x1b[?62;52;c",
                Some(Protocol::Kitty),
            ),
            (
                "\x1bP>|iTerm2 3.5.10\x1b\\\x1b[?62;4c",
                Some(Protocol::Iterm2),
            ),
            (
                "\x1bP>|foot(1.16.2)\x1b\\\x1b[?62;4;22;28c",
                Some(Protocol::Sixel),
            ),
            // 64 is the terminal's class, and 14 is not sixel, which is 4.
            ("\x1b[?64;14;22c", None),
            ("\x1b[?4c", None),
            ("\x1b_Gi=31;ENOTSUPPORTED:none\x1b\\\x1b[?6c", None),
            ("", None),
        ] {
            assert_eq!(Protocol::from_answer(answer), expected, "{answer:?}");
        }
    }
}
