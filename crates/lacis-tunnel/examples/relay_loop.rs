//! Measures two tunnels in network namespaces with iperf3: glued relay outputs, the direct path over a veth cable, and
//! the cable alone for comparison. Prints figures only. Needs root, `ip` and `iperf3`.
//!
//! `cargo run --release -p lacis-tunnel --example relay_loop -- [seconds]`

#![allow(clippy::print_stdout, clippy::print_stderr)] // a program whose output is its purpose

#[path = "../tests/common/mod.rs"]
mod common;

use std::net::IpAddr;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{Side, by_relay, cable, missing, pair};
use lacis_tunnel::{Path, Way};

/// Runs iperf3 from `a` to `to` in `b`; returns the last lines of its report.
fn iperf(a: &Side, b: &Side, to: IpAddr, words: &str) -> String {
    let mut server = b.namespace.run(move || {
        Command::new("iperf3")
            .args(["-s", "-1", "-B", &to.to_string()])
            .stdout(Stdio::null())
            .spawn()
            .expect("iperf3 runs")
    });
    std::thread::sleep(Duration::from_millis(300));
    let output = a.namespace.command("iperf3", &format!("-c {to} -f m {words}"));
    let _ = server.kill();
    let _ = server.wait();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = |role: &str| {
        text.lines().rfind(|line| line.ends_with(role)).map_or_else(String::new, |line| {
            let words: Vec<_> = line.split_whitespace().collect();
            let at = words.iter().position(|word| word.ends_with("bits/sec")).unwrap_or(1);
            words[at - 1..].join(" ")
        })
    };
    format!("sent {} | received {}", line("sender"), line("receiver"))
}

fn memory() -> String {
    std::fs::read_to_string("/proc/self/status")
        .unwrap_or_default()
        .lines()
        .filter(|line| line.starts_with("VmRSS") || line.starts_with("VmHWM"))
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect::<Vec<_>>()
        .join(", ")
}

fn cpu() -> f64 {
    let usage = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let ticks = usage.split_whitespace().skip(13).take(2).filter_map(|word| word.parse::<f64>().ok());
    ticks.sum::<f64>() / 100.0
}

fn main() {
    if let Some(why) = missing() {
        eprintln!("cannot measure here: {why}");
        return;
    }
    let seconds = std::env::args().nth(1).and_then(|word| word.parse::<u32>().ok()).unwrap_or(5);
    let only = std::env::args().nth(2).unwrap_or_default();
    let (mut a, mut b) = pair();
    let (a_addr, b_addr) = cable(&a, &b);
    by_relay(&mut a, &mut b);
    let runs: [(&str, bool, IpAddr, String); 9] = [
        ("cable, TCP", false, b_addr.ip(), format!("-t {seconds}")),
        ("relay, TCP", false, b.v4, format!("-t {seconds}")),
        ("relay, TCP, reverse", false, b.v4, format!("-t {seconds} -R")),
        ("relay, TCP over IPv6, 4 streams", false, b.v6, format!("-t {seconds} -P 4")),
        ("relay, UDP 64 B unlimited", false, b.v4, format!("-t {seconds} -u -b 0 -l 64 -w 4M")),
        ("direct, TCP", true, b.v4, format!("-t {seconds}")),
        ("direct, TCP, 4 streams", true, b.v4, format!("-t {seconds} -P 4")),
        ("direct, UDP 64 B unlimited", true, b.v4, format!("-t {seconds} -u -b 0 -l 64 -w 4M")),
        ("direct, UDP 1200 B unlimited", true, b.v4, format!("-t {seconds} -u -b 0 -l 1200 -w 4M")),
    ];
    for (name, direct, to, words) in runs {
        if !name.contains(&only) {
            continue;
        }
        if direct {
            a.tunnel.set_path(b.key, Path::Direct(Way::main(b_addr)));
            b.tunnel.set_path(a.key, Path::Direct(Way::main(a_addr)));
        }
        let before = cpu();
        let report = iperf(&a, &b, to, &words);
        println!("{name}: {report} | process CPU {:.1} s, {}", cpu() - before, memory());
    }
    for (name, side) in [("a", &a), ("b", &b)] {
        let counts: Vec<_> = side
            .tunnel
            .stats()
            .iter()
            .filter(|(_, count)| *count != 0)
            .map(|(name, count)| format!("{name} {count}"))
            .collect();
        println!("{name}: {}", counts.join(", "));
    }
}
