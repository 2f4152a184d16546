//! What /proc says of a process: CPU time and memory. And percentiles.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::sys;

/// A process that is watched.
#[derive(Debug)]
pub(super) struct Process {
    pid: u32,
}

impl Process {
    pub(super) fn new(pid: u32) -> Self {
        Self { pid }
    }

    /// CPU time that it has used, of all its threads, in user and kernel mode.
    pub(super) fn cpu(&self) -> Result<Duration> {
        let text = self.read("stat")?;
        let ticks = sys::clock_ticks();
        cpu_ticks(&text)
            .map(|used| Duration::from_secs_f64(used as f64 / ticks as f64))
            .context("/proc/PID/stat is not as proc(5) says")
    }

    /// Resident memory.
    pub(super) fn rss_mib(&self) -> Result<f64> {
        self.status("VmRSS:")
    }

    /// The most that it ever had.
    pub(super) fn peak_mib(&self) -> Result<f64> {
        self.status("VmHWM:")
    }

    fn status(&self, field: &str) -> Result<f64> {
        let text = self.read("status")?;
        let kib = text
            .lines()
            .find_map(|line| line.strip_prefix(field)?.trim().strip_suffix(" kB")?.parse::<f64>().ok());
        kib.map(|kib| kib / 1024.0).with_context(|| format!("/proc/PID/status has no {field}"))
    }

    fn read(&self, file: &str) -> Result<String> {
        fs::read_to_string(format!("/proc/{}/{file}", self.pid))
            .with_context(|| format!("the server's process {} is gone", self.pid))
    }
}

/// utime + stime: fields 14 and 15; the second, the program's name, may have spaces and parentheses in it.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let (user, kernel): (u64, u64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    Some(user + kernel)
}

/// The value below which a fraction of sorted values lie (nearest rank).
pub(super) fn percentile(sorted: &[Duration], fraction: f64) -> Option<Duration> {
    let rank = (fraction * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_found_behind_a_name_with_parentheses() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194304 100 0 0 0 12 30 0 0 20 0 4 0 100 1 1";
        assert_eq!(cpu_ticks(stat), Some(42));
    }

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let times: Vec<Duration> = (1..=100).map(Duration::from_millis).collect();
        assert_eq!(percentile(&times, 0.5), Some(Duration::from_millis(50)));
        assert_eq!(percentile(&times, 0.99), Some(Duration::from_millis(99)));
        assert_eq!(percentile(&[], 0.5), None);
    }
}
