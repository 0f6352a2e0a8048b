//! Ctrl-C: the first asks long work to save and stop, the second kills at once.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use anyhow::Result;
use signal_hook::{
    consts::{SIGINT, SIGTERM},
    flag,
};

/// A flag that long work polls, set by Ctrl-C and by SIGTERM (which is how a cluster ends a job).
#[derive(Clone, Debug, Default)]
pub struct Interrupt {
    requested: Arc<AtomicBool>,
    terminated: Arc<AtomicBool>,
}

impl Interrupt {
    /// Catches the signals from now on.
    pub fn install() -> Result<Self> {
        let interrupt = Self::default();
        interrupt.catch_signals()?;
        Ok(interrupt)
    }

    /// Catches the signals from now on, for all who share the flag.
    pub fn catch_signals(&self) -> Result<()> {
        for signal in [SIGINT, SIGTERM] {
            // The order matters: the shutdown looks at the flag before the same signal sets it.
            flag::register_conditional_shutdown(signal, 1, self.requested.clone())?;
            flag::register(signal, self.requested.clone())?;
        }
        flag::register(SIGTERM, self.terminated.clone())?;
        Ok(())
    }

    /// Asks to stop, as Ctrl-C does, from inside the program.
    pub fn request(&self) {
        self.requested.store(true, Ordering::Relaxed);
    }

    /// Whether somebody asked to stop.
    pub fn requested(&self) -> bool {
        self.requested.load(Ordering::Relaxed)
    }

    /// Whether it was SIGTERM that asked: a job that is taken off a machine and saves what it has did nothing wrong.
    pub fn terminated(&self) -> bool {
        self.terminated.load(Ordering::Relaxed)
    }

    /// The error to leave with, once what must be kept is saved.
    pub fn check(&self) -> Result<()> {
        if self.requested() {
            return Err(anyhow::Error::new(Interrupted));
        }
        Ok(())
    }
}

/// Work was left because somebody asked to stop, not because it failed.
#[derive(Debug)]
struct Interrupted;

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("interrupted; run the same command again to go on")
    }
}

impl std::error::Error for Interrupted {}

/// Whether the error, or anything it wraps, is [`Interrupt::check`]'s.
pub fn is_interrupted(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| cause.is::<Interrupted>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_signal_is_a_request() {
        // The one test that may raise it: a second signal would end the test program.
        let interrupt = Interrupt::install().unwrap();
        assert!(!interrupt.requested() && interrupt.check().is_ok());
        signal_hook::low_level::raise(SIGTERM).unwrap();
        assert!(interrupt.requested() && interrupt.terminated());
        let error = interrupt.check().unwrap_err();
        assert!(error.to_string().starts_with("interrupted"));
        assert!(is_interrupted(&error.context("mug")) && !is_interrupted(&anyhow::anyhow!("interrupted")));
    }

    #[test]
    fn a_request_reaches_all_who_share_the_flag() {
        let interrupt = Interrupt::default();
        let shared = interrupt.clone();
        interrupt.request();
        assert!(shared.requested() && !shared.terminated());
    }
}
