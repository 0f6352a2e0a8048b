//! Ctrl-C: the first asks long work to save and stop, the second kills at once.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use anyhow::{Result, bail};
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
        for signal in [SIGINT, SIGTERM] {
            // The order matters: the shutdown looks at the flag before the same signal sets it.
            flag::register_conditional_shutdown(signal, 1, interrupt.requested.clone())?;
            flag::register(signal, interrupt.requested.clone())?;
        }
        flag::register(SIGTERM, interrupt.terminated.clone())?;
        Ok(interrupt)
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
            bail!("interrupted; run the same command again to go on");
        }
        Ok(())
    }
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
        assert!(interrupt.check().unwrap_err().to_string().starts_with("interrupted"));
    }

    #[test]
    fn a_request_reaches_all_who_share_the_flag() {
        let interrupt = Interrupt::default();
        let shared = interrupt.clone();
        interrupt.request();
        assert!(shared.requested() && !shared.terminated());
    }
}
