//! Many processes that train one model: who they are, what they tell each other, and what becomes of a run when one of them
//! fails or is gone. A process is a *rank*, from 0; every one of them makes the same calls in the same order.
//!
//! MPI starts them and carries numbers (feature `mpi`), NCCL what goes from GPU to GPU (feature `nccl`); in a program that was
//! started alone everything here is a plain copy. What is computed in parts, and how gradients are averaged, is the affair of
//! `train`. Read `launch`, then this, then `wire` and `watch`.

pub mod launch;
pub mod watch;
pub mod wire;

#[cfg(feature = "mpi")]
mod mpi;
#[cfg(feature = "nccl")]
mod nccl;

use std::cell::{Cell, RefCell};

use anyhow::{Result, anyhow};

use crate::invalid::{invalid, is_invalid};
use watch::Watch;

/// This process among those that train together.
pub struct Ranks {
    rank: usize,
    count: usize,
    /// Its number among the ranks of this machine, and theirs.
    local: (usize, usize),
    engine: Engine,
    /// None: tensors on GPUs go through the host.
    #[cfg(feature = "nccl")]
    nccl: std::cell::OnceCell<nccl::Nccl>,
    watch: RefCell<Option<Watch>>,
    has_agreed_to_fail: Cell<bool>,
}

enum Engine {
    Alone,
    #[cfg(feature = "mpi")]
    Mpi(mpi::Mpi),
}

impl Ranks {
    /// One process that does everything.
    pub fn alone() -> Self {
        Self {
            rank: 0,
            count: 1,
            local: (0, 1),
            engine: Engine::Alone,
            #[cfg(feature = "nccl")]
            nccl: std::cell::OnceCell::new(),
            watch: RefCell::new(None),
            has_agreed_to_fail: Cell::new(false),
        }
    }

    /// Joins the processes that this one was started with; alone if there are none. Call it once, from the thread that will
    /// make all other calls.
    pub fn join() -> Result<Self> {
        match launch::started_together() {
            None | Some(1) => Ok(Self::alone()),
            Some(count) => Self::join_by_mpi(count),
        }
    }

    #[cfg(not(feature = "mpi"))]
    fn join_by_mpi(count: usize) -> Result<Self> {
        Err(invalid(format!(
            "jedi train: started as one of {count} processes, but built without `--features mpi`, so that each would train by \
             itself; build it with that feature, or start one process"
        )))
    }

    #[cfg(feature = "mpi")]
    fn join_by_mpi(started: usize) -> Result<Self> {
        let mpi = mpi::Mpi::join()?;
        let (rank, count, local) = (mpi.rank(), mpi.count(), mpi.local());
        if count != started {
            // Without this each process would train a model of its own, and all would write into one folder.
            return Err(invalid(format!(
                "jedi train: started as one of {started} processes, but MPI knows of {count}; use the mpirun of the MPI that \
                 jedi was built with, or a plugin of srun that it understands (srun --mpi=list, such as --mpi=pmix)"
            )));
        }
        Ok(Self { rank, count, local, engine: Engine::Mpi(mpi), ..Self::alone() })
    }

    /// From 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// All ranks.
    pub fn count(&self) -> usize {
        self.count
    }

    /// From 0, among the ranks of this machine.
    pub fn local_rank(&self) -> usize {
        self.local.0
    }

    /// Ranks of this machine.
    pub fn local_count(&self) -> usize {
        self.local.1
    }

    /// CPUs that it should keep busy: its share of those that it may use; None where the system does not tell.
    pub fn own_cpus(&self) -> Option<usize> {
        launch::own_cpus(Some(self.local_count()))
    }

    /// The rank that writes, prints and answers for all.
    pub fn is_first(&self) -> bool {
        self.rank == 0
    }

    /// From now on a rank that is gone ends the run: `end` hears in one sentence who it was, on every rank that still is, on
    /// another thread. False: the watch could not be set up, and only the launcher will notice.
    pub fn watch(&self, end: impl Fn(watch::Loss) + Send + Sync + 'static) -> Result<bool> {
        if self.count == 1 {
            return Ok(true);
        }
        let place = self.is_first().then(watch::Post::open).transpose();
        let post = self.all_succeed(place)?;
        let address = post.as_ref().map(watch::Post::address).unwrap_or_default().into_bytes();
        let address = self.broadcast_bytes(address, 0);
        let address = String::from_utf8_lossy(&address).into_owned();
        let watch = match post {
            Some(post) => post.gather(self.count, end),
            None => watch::Watch::report_to(&address, self.rank, end),
        };
        // Where one cannot reach the first rank (a firewall), none is watched.
        let is_set_up = !self.any(watch.is_err());
        match watch {
            Ok(watch) if is_set_up => *self.watch.borrow_mut() = Some(watch),
            Ok(watch) => watch.dismiss(),
            Err(_) => {}
        }
        Ok(is_set_up)
    }

    /// Whether it is so on any rank.
    pub fn any(&self, is_so: bool) -> bool {
        self.sum(f64::from(u8::from(is_so))) > 0.0
    }

    /// The sum over all ranks, in the order of ranks: the same bits everywhere.
    pub fn sum(&self, own: f64) -> f64 {
        self.sums(&[own])[0]
    }

    /// The same for each of several numbers, of which all ranks give as many.
    pub fn sums(&self, own: &[f64]) -> Vec<f64> {
        let bytes: Vec<u8> = own.iter().flat_map(|value| value.to_le_bytes()).collect();
        let mut sums = vec![0.0; own.len()];
        for bytes in self.gather_bytes(&bytes) {
            let (values, _) = bytes.as_chunks::<8>();
            sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += f64::from_le_bytes(*value));
        }
        sums
    }

    /// Goes on if all ranks do. If one failed, all get the error of the first that did, and which rank it was.
    pub fn all_succeed<T>(&self, own: Result<T>) -> Result<T> {
        if self.count == 1 {
            return own;
        }
        // Nothing: done. Else a digit (1: wrong use) and the message.
        let told = match &own {
            Ok(_) => vec![],
            Err(error) => format!("{}{error:#}", u8::from(is_invalid(error))).into_bytes(),
        };
        let all = self.gather_bytes(&told);
        let Some((rank, failed)) = all.iter().enumerate().find(|(_, told)| !told.is_empty()) else { return own };
        self.has_agreed_to_fail.set(true);
        let (kind, message) = failed.split_at(1);
        let message = String::from_utf8_lossy(message);
        let message = match rank {
            0 => message.into_owned(),
            rank => format!("rank {rank} of {}: {message}", self.count),
        };
        Err(if kind == b"1" { invalid(message) } else { anyhow!(message) })
    }

    /// What the first rank alone does; all go on once it is done, or fail with it. None elsewhere.
    pub fn on_first<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<Option<T>> {
        self.all_succeed(self.is_first().then(work).transpose())
    }

    /// Refuses to go on if not all ranks have the same; `what` names it.
    pub fn all_have_same(&self, what: &str, own: &[u8]) -> Result<()> {
        let first = own.to_vec();
        let first = self.broadcast_bytes(first, 0);
        self.all_succeed(if first == own { Ok(()) } else { Err(invalid(format!("{what}: not the same as on rank 0"))) })
    }

    /// True behind an error that all ranks know of: the first one tells it.
    pub fn has_agreed_to_fail(&self) -> bool {
        self.has_agreed_to_fail.get()
    }

    /// Ends the work together. To be called by all ranks, where they have agreed on how it ended.
    pub fn leave(&self) {
        // All are here: from now on one that goes is not lost.
        self.any(false);
        if let Some(watch) = self.watch.take() {
            watch.dismiss();
        }
        match &self.engine {
            Engine::Alone => {}
            #[cfg(feature = "mpi")]
            Engine::Mpi(mpi) => mpi.leave(),
        }
    }
}

/// Numbers and bytes from rank to rank, from the host's memory to the host's memory; tensors go by [`Ranks::wire`]. No call
/// takes more than [`Ranks::MAX_VALUES`] values in all.
impl Ranks {
    /// MPI counts in 32 bits.
    pub const MAX_VALUES: usize = i32::MAX as usize;

    /// Sends to each rank its part of `values`, where `lengths` has the parts in order, and returns what the ranks sent to
    /// this one, in their order.
    fn exchange(&self, values: &[f32], lengths: &[usize]) -> Vec<f32> {
        debug_assert_eq!(values.len(), lengths.iter().sum::<usize>());
        match &self.engine {
            Engine::Alone => values.to_vec(),
            #[cfg(feature = "mpi")]
            Engine::Mpi(mpi) => mpi.exchange(values, lengths),
        }
    }

    /// The values of all ranks in their order; rank r gives `lengths[r]`.
    fn gather(&self, own: &[f32], lengths: &[usize]) -> Vec<f32> {
        debug_assert_eq!(own.len(), lengths[self.rank]);
        match &self.engine {
            Engine::Alone => own.to_vec(),
            #[cfg(feature = "mpi")]
            Engine::Mpi(mpi) => mpi.gather(own, lengths),
        }
    }

    /// Every rank gets the values of rank `from`.
    fn broadcast(&self, values: &mut [f32], from: usize) {
        match &self.engine {
            Engine::Alone => debug_assert!(from == 0 || values.is_empty()),
            #[cfg(feature = "mpi")]
            Engine::Mpi(mpi) => mpi.broadcast(values, from),
        }
    }

    /// Every rank gets the bytes of rank `from`, however many.
    pub fn broadcast_bytes(&self, bytes: Vec<u8>, from: usize) -> Vec<u8> {
        match &self.engine {
            Engine::Alone => {
                debug_assert!(from == 0 || bytes.is_empty());
                bytes
            }
            #[cfg(feature = "mpi")]
            Engine::Mpi(mpi) => mpi.broadcast_bytes(bytes, from),
        }
    }

    /// The bytes of all ranks, in their order.
    fn gather_bytes(&self, own: &[u8]) -> Vec<Vec<u8>> {
        match &self.engine {
            Engine::Alone => vec![own.to_vec()],
            #[cfg(feature = "mpi")]
            Engine::Mpi(mpi) => mpi.gather_bytes(own),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_alone_keeps_what_it_has() {
        let ranks = Ranks::alone();
        assert!(ranks.is_first() && ranks.count() == 1);
        assert_eq!(ranks.exchange(&[1.0, 2.0], &[2]), [1.0, 2.0]);
        assert_eq!(ranks.gather(&[3.0], &[1]), [3.0]);
        assert!(ranks.any(true) && !ranks.any(false));
        assert_eq!(ranks.sum(0.25), 0.25);
        assert_eq!(ranks.sums(&[1.0, 2.0]), [1.0, 2.0]);
        assert_eq!(ranks.on_first(|| Ok(7)).unwrap(), Some(7));
        let failed: Result<()> = ranks.all_succeed(Err(invalid("--x: wrong")));
        assert!(is_invalid(&failed.unwrap_err()) && !ranks.has_agreed_to_fail());
        ranks.leave();
    }
}
