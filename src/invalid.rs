//! The error for what the user asked wrongly (a flag, a setting, a file that is not there), apart from what went wrong:
//! the program then exits with 2, not 1. Any room may raise it; it survives `.context(…)`.

use std::fmt;

/// Wrong usage or config, in one sentence: the option or file first, then the cause, then the fix.
#[derive(Debug)]
pub struct Invalid(String);

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Invalid {}

/// `Invalid` as an `anyhow` error: `return Err(invalid(format!("--size {px}: …")))`.
pub fn invalid(message: impl Into<String>) -> anyhow::Error {
    anyhow::Error::new(Invalid(message.into()))
}

/// Whether the error, or anything it wraps, is the user's to mend.
pub fn is_invalid(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| cause.is::<Invalid>())
}

#[cfg(test)]
mod tests {
    use anyhow::{Context as _, Result, anyhow};

    use super::*;

    #[test]
    fn is_recognised_under_context() {
        let asked_wrongly: Result<()> = Err(invalid("--size 3: too small")).context("sample").context("again");
        assert!(asked_wrongly.is_err_and(|error| is_invalid(&error)));
        assert!(!is_invalid(&anyhow!("disk full").context("sample")));
    }
}
