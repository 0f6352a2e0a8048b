//! The binary: parse, dispatch, and turn the outcome into an exit code.

fn main() -> std::process::ExitCode {
    jedi::commands::run()
}
