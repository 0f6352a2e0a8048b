//! What the launcher (`mpirun`, `srun`) says in the environment, before MPI is asked: how many processes were started
//! together, how many of them on this machine, and so how many CPUs each may take.

use std::env;
use std::fs;
use std::thread;

/// Variables with the number of processes of a start: Open MPI, Hydra (MPICH, Intel MPI), MVAPICH, and srun.
const COUNTS: &[&str] = &["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"];
/// The same for those on this machine.
const LOCAL_COUNTS: &[&str] = &["OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_LOCAL_SIZE"];

/// Processes that were started together with this one; None: it was started alone.
pub fn started_together() -> Option<usize> {
    first_number(COUNTS, &|name| env::var(name).ok())
}

/// CPUs that this process should keep busy: all that it may use, but for the share of the others that were started with it
/// on this machine where they may use the same. `n_here`: all of them, this one included; None: as many as the launcher says.
/// None where the system does not tell.
pub fn own_cpus(n_here: Option<usize>) -> Option<usize> {
    let usable = thread::available_parallelism().ok()?.get();
    let of_parent = parent_status().as_deref().and_then(allowed_cpus);
    Some(share_of_cpus(usable, of_parent, n_here, &|name| env::var(name).ok()))
}

/// What Linux knows of the launcher.
#[cfg(unix)]
fn parent_status() -> Option<String> {
    fs::read_to_string(format!("/proc/{}/status", std::os::unix::process::parent_id())).ok()
}

#[cfg(not(unix))]
fn parent_status() -> Option<String> {
    None
}

fn share_of_cpus(
    usable: usize,
    of_parent: Option<usize>,
    n_here: Option<usize>,
    variable: &dyn Fn(&str) -> Option<String>,
) -> usize {
    // `srun --cpus-per-task`, whether it binds them or not.
    if let Some(cpus) = variable("SLURM_STEP_NUM_TASKS").and_then(|_| variable("SLURM_CPUS_PER_TASK")?.parse().ok()) {
        return usable.min(cpus).max(1);
    }
    let n_here = n_here.or_else(|| first_number(LOCAL_COUNTS, variable)).or_else(|| tasks_here(variable)).unwrap_or(1);
    // The launcher has bound this process to some of the CPUs that it may use itself: the others have theirs.
    let is_bound = of_parent.is_some_and(|of_parent| usable < of_parent);
    if is_bound { usable } else { (usable / n_here).max(1) }
}

fn first_number(names: &[&str], variable: &dyn Fn(&str) -> Option<String>) -> Option<usize> {
    names.iter().find_map(|name| variable(name)?.parse().ok()).filter(|&n| n > 0)
}

/// srun's tasks on this machine, which it need not bind. It counts those of each, as in `4(x2),3`: twice four, and three.
fn tasks_here(variable: &dyn Fn(&str) -> Option<String>) -> Option<usize> {
    let mut before: usize = variable("SLURM_NODEID")?.parse().ok()?;
    for group in variable("SLURM_STEP_TASKS_PER_NODE")?.split(',') {
        let (tasks, machines) = match group.split_once("(x") {
            Some((tasks, machines)) => (tasks, machines.strip_suffix(')')?.parse().ok()?),
            None => (group, 1),
        };
        if before < machines {
            return tasks.parse().ok().filter(|&n| n > 0);
        }
        before -= machines;
    }
    None
}

/// The number of CPUs in `Cpus_allowed_list` of a `/proc/<id>/status`, such as `0-3,8`.
fn allowed_cpus(status: &str) -> Option<usize> {
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?.trim();
    let count = |range: &str| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        Some(last.parse::<usize>().ok()?.checked_sub(first.parse().ok()?)? + 1)
    };
    list.split(',').map(count).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(usable: usize, of_parent: usize, variables: &[(&str, &str)]) -> usize {
        let find = |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.to_string());
        share_of_cpus(usable, Some(of_parent), None, &find)
    }

    #[test]
    fn neighbours_share_the_cpus_that_nobody_has_dealt_out() {
        assert_eq!(share(8, 8, &[]), 8);
        assert_eq!(share(8, 8, &[("OMPI_COMM_WORLD_LOCAL_SIZE", "4")]), 2);
        assert_eq!(share(2, 2, &[("OMPI_COMM_WORLD_LOCAL_SIZE", "4")]), 1);
        assert_eq!(share(8, 8, &[("MPI_LOCALNRANKS", "3")]), 2);
        // Bound by mpirun, two CPUs each.
        assert_eq!(share(2, 8, &[("OMPI_COMM_WORLD_LOCAL_SIZE", "4")]), 2);
        // A container with four of the machine's CPUs, where nothing was started together.
        assert_eq!(share(4, 64, &[]), 4);
        assert_eq!(share(64, 64, &[("SLURM_STEP_NUM_TASKS", "8"), ("SLURM_CPUS_PER_TASK", "16")]), 16);
        // srun that binds nothing: on the third machine are three tasks.
        let tasks = ("SLURM_STEP_TASKS_PER_NODE", "4(x2),3");
        assert_eq!(share(64, 64, &[("SLURM_STEP_NUM_TASKS", "11"), tasks, ("SLURM_NODEID", "2")]), 21);
        assert_eq!(share(64, 64, &[("SLURM_STEP_NUM_TASKS", "11"), tasks, ("SLURM_NODEID", "1")]), 16);
        assert_eq!(share(64, 64, &[tasks, ("SLURM_NODEID", "3")]), 64);
        // In a batch script, outside of srun.
        assert_eq!(share(64, 64, &[("SLURM_CPUS_PER_TASK", "16")]), 64);
    }

    #[test]
    fn what_mpi_counts_goes_before_what_the_launcher_says() {
        let says = |name: &str| (name == "OMPI_COMM_WORLD_LOCAL_SIZE").then(|| "4".to_owned());
        assert_eq!(share_of_cpus(8, Some(8), Some(2), &says), 4);
        assert_eq!(share_of_cpus(8, None, Some(16), &says), 1);
        // Bound CPUs are nobody else's.
        assert_eq!(share_of_cpus(3, Some(8), Some(2), &says), 3);
    }

    #[test]
    fn lists_of_cpus_are_counted() {
        assert_eq!(allowed_cpus("Name:\tsh\nCpus_allowed_list:\t0-3,8\n"), Some(5));
        assert_eq!(allowed_cpus("Cpus_allowed_list:\t0\n"), Some(1));
        assert_eq!(allowed_cpus("Name:\tsh\n"), None);
    }
}
