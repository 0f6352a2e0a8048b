//! The only printer. Results go to stdout, everything else to stderr; colour and bars only on a terminal.

use std::{
    io::{self, IsTerminal as _, Write as _},
    sync::{
        LazyLock,
        atomic::{AtomicBool, Ordering},
    },
};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// All bars, so that a line printed while one is drawn does not tear it.
static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// Of many processes one speaks for all.
static IS_HUSHED: AtomicBool = AtomicBool::new(false);
static ARE_ERRORS_HUSHED: AtomicBool = AtomicBool::new(false);

/// From now on this process says nothing but its errors: another one does the same and says it.
pub fn hush() {
    IS_HUSHED.store(true, Ordering::Relaxed);
}

/// From now on its errors are told elsewhere too.
pub fn hush_errors() {
    ARE_ERRORS_HUSHED.store(true, Ordering::Relaxed);
}

fn is_hushed() -> bool {
    IS_HUSHED.load(Ordering::Relaxed)
}

/// One line of results on stdout. Hand its error on: a reader that went away (`| head`) then ends the program quietly.
pub fn result(line: impl AsRef<str>) -> io::Result<()> {
    if is_hushed() {
        return Ok(());
    }
    BARS.suspend(|| {
        let mut stdout = io::stdout().lock();
        writeln!(stdout, "{}", line.as_ref())?;
        stdout.flush()
    })
}

/// What the program does or found, for the one who watches.
pub fn note(line: impl AsRef<str>) {
    if !is_hushed() {
        to_stderr(line.as_ref());
    }
}

/// The same where each of many processes has something of its own to say: none of them is hushed.
pub fn note_of_any(line: impl AsRef<str>) {
    to_stderr(line.as_ref());
}

/// What may surprise, though the work goes on.
pub fn warn(line: impl AsRef<str>) {
    note(format!("{} {}", labelled("warning:", "33"), line.as_ref()));
}

/// The same of what one of many processes alone has met.
pub fn warn_of_any(line: impl AsRef<str>) {
    note_of_any(format!("{} {}", labelled("warning:", "33"), line.as_ref()));
}

/// Why the work stopped, with all its causes, on one line.
pub fn error(error: &anyhow::Error) {
    if !ARE_ERRORS_HUSHED.load(Ordering::Relaxed) {
        to_stderr(&format!("{} {error:#}", labelled("error:", "31")));
    }
}

/// Clap's own answer: help and version on stdout, a usage error on stderr.
pub fn usage(answer: &clap::Error) -> io::Result<()> {
    answer.print()
}

/// A bar over `len` pieces of work, named `what`, with rate and time left; hidden when stderr is not a terminal (say
/// where you are through `note` now and then).
pub fn progress(len: u64, what: &'static str) -> ProgressBar {
    bar(len, what.to_owned(), "{prefix} {wide_bar} {pos}/{len} {msg} {per_sec}, {eta} left")
}

/// The same over the bytes of a file.
pub fn download(n_bytes: u64, file: &str) -> ProgressBar {
    bar(n_bytes, file.to_owned(), "{prefix} {wide_bar} {bytes}/{total_bytes}, {bytes_per_sec}, {eta} left")
}

fn bar(len: u64, what: String, template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template);
    let bar = ProgressBar::new(len).with_prefix(what);
    let bar = if let Ok(style) = style { bar.with_style(style) } else { bar };
    if !has_bars() {
        bar.set_draw_target(ProgressDrawTarget::hidden());
        return bar;
    }
    BARS.add(bar)
}

/// Whether bars are drawn; where they are not, long work notes plain lines.
pub fn has_bars() -> bool {
    io::stderr().is_terminal() && !is_hushed()
}

fn to_stderr(line: &str) {
    // Nobody is left to hear that stderr is closed, and the work does not depend on it.
    BARS.suspend(|| writeln!(io::stderr().lock(), "{line}").ok());
}

fn labelled(label: &str, colour: &str) -> String {
    let wants_colour = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    if wants_colour { format!("\x1b[1;{colour}m{label}\x1b[0m") } else { label.to_owned() }
}
