//! The resources that a process and its children use, from `/proc`.

use std::fs::read_to_string;
use std::time::Duration;

/// A process with all its current descendants.
#[derive(Debug, Clone, Copy)]
pub struct Tree(pub u32);

impl Tree {
    /// The process ids. Empty if the process does not exist.
    pub fn processes(self) -> Vec<u32> {
        let parents: Vec<(u32, u32)> = std::fs::read_dir("/proc")
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter_map(|pid| Some((pid, stat(pid)?.get(1)?.parse().ok()?)))
            .collect();
        let mut tree: Vec<u32> = parents.iter().map(|(pid, _)| *pid).filter(|pid| *pid == self.0).collect();
        let mut next = 0;
        while next < tree.len() {
            let parent = tree[next];
            tree.extend(parents.iter().filter(|(_, its_parent)| *its_parent == parent).map(|(pid, _)| *pid));
            next += 1;
        }
        tree
    }

    /// CPU time of the processes in user space and in the kernel, with a resolution of 10 ms.
    pub fn cpu(self) -> Duration {
        let ticks = |pid| {
            let stat = stat(pid)?;
            Some(stat.get(11)?.parse::<u64>().ok()? + stat.get(12)?.parse::<u64>().ok()?)
        };
        let sum: u64 = self.processes().into_iter().filter_map(ticks).sum();
        Duration::from_secs_f64(sum as f64 / rustix::param::clock_ticks_per_second() as f64)
    }

    /// Resident memory in bytes.
    pub fn resident(self) -> u64 {
        self.sum("status", "VmRSS:")
    }

    /// Resident memory of a process without its children, in bytes.
    pub fn resident_alone(pid: u32) -> Option<f64> {
        Some(kilobytes(pid, "status", "VmRSS:")? as f64 * 1024.0)
    }

    /// Proportional memory in bytes: a shared page counts in part.
    pub fn proportional(self) -> u64 {
        self.sum("smaps_rollup", "Pss:")
    }

    fn sum(self, file: &str, line: &str) -> u64 {
        self.processes().into_iter().filter_map(|pid| kilobytes(pid, file, line)).sum::<u64>() * 1024
    }
}

fn kilobytes(pid: u32, file: &str, line: &str) -> Option<u64> {
    let text = read_to_string(format!("/proc/{pid}/{file}")).ok()?;
    text.lines().find_map(|found| found.strip_prefix(line))?.split_whitespace().next()?.parse().ok()
}

/// The fields of `/proc/PID/stat` after the name: state, parent, … The name may contain spaces and brackets.
fn stat(pid: u32) -> Option<Vec<String>> {
    let stat = read_to_string(format!("/proc/{pid}/stat")).ok()?;
    Some(stat.rsplit_once(')')?.1.split_whitespace().map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_has_the_process_and_its_children_with_their_usage() {
        let me = Tree(std::process::id());
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let found = me.processes();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(found.contains(&me.0) && found.contains(&child.id()), "{found:?}");
        assert!(!me.processes().contains(&child.id()));
        assert!(me.resident() > 1 << 20 && me.proportional() > 0);
        let before = me.cpu();
        while me.cpu() == before {}
        assert!(Tree(u32::MAX).processes().is_empty());
    }
}
