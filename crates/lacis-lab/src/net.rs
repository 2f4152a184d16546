//! Builds a plan's network: a namespace for every node, a cable for every uplink, rules in every router.
//!
//! Works by `ip -batch` and `nft`, in a network namespace and a mount namespace of the lab's own, so that names
//! never collide with anything on the machine and nothing is left behind.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::plan::{INTERNET, INTERNET_ADDRESS, Link, Node, Plan, RESOLVER, Role};

/// Kernel settings of every namespace: no waiting for duplicate address detection, addresses kept on link down.
const SETTINGS: &str = "for d in all default; do echo 0 >/proc/sys/net/ipv6/conf/$d/accept_dad; \
    echo 1 >/proc/sys/net/ipv6/conf/$d/keep_addr_on_down; echo 0 >/proc/sys/net/ipv4/conf/$d/rp_filter; done 2>/dev/null; ";
/// And of those that forward: what crosses a router's bridge is nothing to its rules, whatever the kernel's default.
const FORWARDING: &str = "echo 1 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding; \
    for f in /proc/sys/net/bridge/bridge-nf-call-*; do echo 0 >$f; done 2>/dev/null; ";

/// Builds everything.
pub fn build(plan: &Plan) -> Result<()> {
    let mut batch = String::new();
    for name in plan.nodes.keys() {
        let _ = writeln!(batch, "netns add {name}");
    }
    ip(None, &batch)?;
    // Bridges first: cables of hosts become their ports.
    for (name, node) in &plan.nodes {
        prepare(name, node)?;
    }
    for (name, node) in &plan.nodes {
        for link in node.uplink.iter().chain(&node.also) {
            plug(name, link)?;
        }
    }
    Ok(())
}

/// Gives one host a fresh network namespace, as a boot does: nothing of rules, routes or tables remains.
pub fn rebuild(plan: &Plan, name: &str) -> Result<()> {
    let node = plan.nodes.get(name).with_context(|| format!("there is no node {name}"))?;
    ip(None, &format!("netns del {name}\nnetns add {name}\n"))?;
    prepare(name, node)?;
    for link in node.uplink.iter().chain(&node.also) {
        replug(name, link)?;
    }
    Ok(())
}

fn replug(name: &str, link: &Link) -> Result<()> {
    // The far end of the old cable goes with the namespace, but only when the kernel gets to it.
    for _ in 0..100 {
        let there = Command::new("ip")
            .args(["-n", &link.other, "link", "show", &link.other_device])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()?;
        if !there.success() {
            return plug(name, link);
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    bail!("the old cable of {name} does not go away")
}

fn prepare(name: &str, node: &Node) -> Result<()> {
    let forwarding = if node.role == Role::Host { "" } else { FORWARDING };
    run(
        Command::new("ip").args(["netns", "exec", name, "sh", "-c", &format!("{SETTINGS}{forwarding}true")]),
        "",
    )?;
    let mut batch = String::from("link set lo up\n");
    if name == INTERNET {
        let _ = writeln!(batch, "addr add {INTERNET_ADDRESS}/32 dev lo\naddr add {RESOLVER}/32 dev lo");
    }
    if node.role == Role::Router {
        batch.push_str("link add lan type bridge\nlink set lan up\n");
        for address in &node.lan {
            let _ = writeln!(batch, "addr add {address} dev lan{}", no_dad(address));
        }
        if let Some(mtu) = node.mtu {
            let _ = writeln!(batch, "link set lan mtu {mtu}");
        }
    }
    ip(Some(name), &batch)?;
    if let Some(ruleset) = &node.ruleset {
        run(Command::new("ip").args(["netns", "exec", name, "nft", "-f", "-"]), ruleset)?;
    }
    Ok(())
}

fn plug(name: &str, link: &Link) -> Result<()> {
    let Link { device, other, other_device, .. } = link;
    ip(None, &format!("link add {device} netns {name} type veth peer name {other_device} netns {other}\n"))?;
    let mut there = String::new();
    if let Some(bridge) = &link.other_bridge {
        let _ = writeln!(there, "link set {other_device} master {bridge}");
    }
    let _ = writeln!(there, "link set {other_device} up");
    for address in &link.other_addresses {
        let _ = writeln!(there, "addr add {address} dev {other_device}{}", no_dad(address));
    }
    ip(Some(other), &there)?;
    let mut here = String::new();
    for address in &link.addresses {
        let _ = writeln!(here, "addr add {address} dev {device}{}", no_dad(address));
    }
    let _ = writeln!(here, "link set {device} up");
    for route in &link.routes {
        let _ = writeln!(here, "route add {route}");
    }
    ip(Some(name), &here)?;
    let mut back = String::new();
    for route in &link.other_routes {
        let _ = writeln!(back, "route replace {route}");
    }
    ip(Some(other), &back)
}

fn no_dad(address: &str) -> &'static str {
    if address.contains(':') { " nodad" } else { "" }
}

fn ip(namespace: Option<&str>, batch: &str) -> Result<()> {
    if batch.is_empty() {
        return Ok(());
    }
    let mut command = Command::new("ip");
    if let Some(namespace) = namespace {
        command.args(["-n", namespace]);
    }
    run(command.args(["-batch", "-"]), batch)
}

fn run(command: &mut Command, input: &str) -> Result<()> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {}", command.get_program().display()))?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes())?;
    }
    let output = child.wait_with_output()?;
    if !output.status.success() {
        let arguments: Vec<_> = command.get_args().map(|argument| argument.to_string_lossy()).collect();
        bail!(
            "{} {}: {}\n{input}",
            command.get_program().to_string_lossy(),
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}
