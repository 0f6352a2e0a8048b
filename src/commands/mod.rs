//! One file a verb: arguments and files become settings, the library does the work, `report` prints.

/// Runs the program; the exit code is 0 done, 1 failed, 2 wrong usage or config.
pub fn run() -> std::process::ExitCode {
    std::process::ExitCode::SUCCESS
}
