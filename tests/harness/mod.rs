//! Runs the built binary as a user would: black box, arguments in, exit code and text out.

use std::{
    ffi::OsStr,
    process::{Command, Output},
};

/// What a finished run left.
pub struct Outcome {
    /// `None`: ended by a signal.
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

/// The binary, not yet started.
pub fn command<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_jedi"));
    command.args(args);
    command
}

/// Runs the binary to its end.
pub fn jedi<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>) -> Outcome {
    let Output { status, stdout, stderr } = command(args).output().expect("the binary starts");
    let text = |bytes| String::from_utf8(bytes).expect("the binary writes UTF-8");
    Outcome { code: status.code(), stdout: text(stdout), stderr: text(stderr) }
}
