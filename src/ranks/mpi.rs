//! MPI (crate `mpi`): whatever library `mpicc` links to. Calls are blocking; a failed one ends the program, by MPI's own
//! message. What must not be rounded in an order of the library's choosing is summed by the caller.

use std::cell::RefCell;
use std::mem;
use std::thread;

use anyhow::{Context, Result};
use mpi::Threading;
use mpi::datatype::{Partition, PartitionMut};
use mpi::environment::Universe;
use mpi::topology::SimpleCommunicator;
use mpi::traits::*;

/// The connection to the other processes.
pub struct Mpi {
    /// Dropped by [`Mpi::leave`] alone: to finalise MPI waits for all ranks, which must not happen behind an error of one.
    universe: RefCell<Option<Universe>>,
    world: SimpleCommunicator,
    /// Its number among the ranks of this machine, and theirs.
    local: (usize, usize),
}

impl Mpi {
    /// Starts MPI. Other threads than the calling one never call it.
    pub fn join() -> Result<Self> {
        let (universe, _) = mpi::initialize_with_threading(Threading::Funneled).context("MPI was started twice")?;
        let world = universe.world();
        let here = world.split_shared(world.rank());
        let local = (here.rank() as usize, here.size() as usize);
        drop(here);
        Ok(Self { universe: RefCell::new(Some(universe)), world, local })
    }

    pub fn rank(&self) -> usize {
        self.world.rank() as usize
    }

    pub fn count(&self) -> usize {
        self.world.size() as usize
    }

    /// Number and count.
    pub fn local(&self) -> (usize, usize) {
        self.local
    }

    pub fn exchange(&self, values: &[f32], lengths: &[usize]) -> Vec<f32> {
        let sent = counts(lengths);
        let own = lengths[self.rank()];
        let received = counts(&vec![own; self.count()]);
        let mut out = vec![0f32; own * self.count()];
        let from = Partition::new(values, &sent[..], offsets(&sent));
        let mut to = PartitionMut::new(&mut out[..], &received[..], offsets(&received));
        self.world.all_to_all_varcount_into(&from, &mut to);
        out
    }

    pub fn gather(&self, own: &[f32], lengths: &[usize]) -> Vec<f32> {
        let received = counts(lengths);
        let mut out = vec![0f32; lengths.iter().sum()];
        let mut to = PartitionMut::new(&mut out[..], &received[..], offsets(&received));
        self.world.all_gather_varcount_into(own, &mut to);
        out
    }

    pub fn broadcast(&self, values: &mut [f32], from: usize) {
        self.world.process_at_rank(from as i32).broadcast_into(values);
    }

    pub fn broadcast_bytes(&self, mut bytes: Vec<u8>, from: usize) -> Vec<u8> {
        let root = self.world.process_at_rank(from as i32);
        let mut length = bytes.len() as u64;
        root.broadcast_into(&mut length);
        bytes.resize(length as usize, 0);
        if length > 0 {
            root.broadcast_into(&mut bytes[..]);
        }
        bytes
    }

    pub fn gather_bytes(&self, own: &[u8]) -> Vec<Vec<u8>> {
        let mut lengths = vec![0u64; self.count()];
        self.world.all_gather_into(&(own.len() as u64), &mut lengths[..]);
        let lengths: Vec<usize> = lengths.into_iter().map(|length| length as usize).collect();
        let (received, total) = (counts(&lengths), lengths.iter().sum());
        // A byte more: an empty slice of bytes has the address 1, which is Open MPI's MPI_IN_PLACE.
        let sent = [own, &[0]].concat();
        let mut out = vec![0u8; total + 1];
        let starts = offsets(&received);
        let mut to = PartitionMut::new(&mut out[..total], &received[..], &starts[..]);
        self.world.all_gather_varcount_into(&sent[..own.len()], &mut to);
        let piece = |(start, length): (&i32, usize)| out[*start as usize..][..length].to_vec();
        starts.iter().zip(lengths).map(piece).collect()
    }

    /// Finalises MPI, with all others.
    pub fn leave(&self) {
        drop(self.universe.take());
    }
}

impl Drop for Mpi {
    fn drop(&mut self) {
        let Some(universe) = self.universe.take() else { return };
        if thread::panicking() {
            // The others would wait in a call for ever.
            self.world.abort(101);
        }
        mem::forget(universe);
    }
}

/// As MPI counts. The callers keep to [`super::Ranks::MAX_VALUES`].
fn counts(lengths: &[usize]) -> Vec<i32> {
    lengths.iter().map(|&length| i32::try_from(length).expect("no more values than MPI can count")).collect()
}

fn offsets(counts: &[i32]) -> Vec<i32> {
    counts.iter().scan(0, |end, count| Some(std::mem::replace(end, *end + count))).collect()
}
