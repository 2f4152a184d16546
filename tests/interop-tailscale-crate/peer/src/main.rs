//! A node made of the independent crate `tailscale`: joins by a pre-auth key, then echoes datagrams or sends some
//! and counts the answers. The scenario beside this package runs one of each against our coordinator and relay.
//!
//!     interop-peer URL AUTH_KEY_FILE HOSTNAME echo PORT
//!     interop-peer URL AUTH_KEY_FILE HOSTNAME send ADDRESS PORT COUNT

use std::error::Error;
use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::timeout;

/// The crate reports no home relay until its map stream has settled, so the first datagrams of a pair may be lost.
const FIRST_ANSWER: Duration = Duration::from_secs(60);
/// Once a first answer came, each further one should come within this.
const NEXT_ANSWER: Duration = Duration::from_secs(3);

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [url, key_file, hostname, command, rest @ ..] = arguments.as_slice() else {
        return Err(
            "usage: interop-peer URL AUTH_KEY_FILE HOSTNAME echo PORT | send ADDRESS PORT COUNT".into()
        );
    };
    let config = tailscale::Config {
        control_server_url: url.parse()?,
        requested_hostname: Some(hostname.clone()),
        client_name: Some("lacis-interop".to_owned()),
        ..tailscale::Config::default()
    };
    let key = std::fs::read_to_string(key_file)?.trim().to_owned();
    let device = tailscale::Device::new(&config, Some(key)).await?;
    let own = device.ipv4_addr().await?;
    say(&format!("address {own}"));
    match (command.as_str(), rest) {
        ("echo", [port]) => echo(&device, SocketAddr::new(own.into(), port.parse()?)).await,
        ("send", [address, port, count]) => {
            let to = SocketAddr::new(address.parse::<IpAddr>()?, port.parse()?);
            send(&device, SocketAddr::new(own.into(), 4000), to, count.parse()?).await
        }
        _ => Err(format!("unknown command {command}").into()),
    }
}

async fn echo(device: &tailscale::Device, at: SocketAddr) -> Result<(), Box<dyn Error>> {
    let socket = device.udp_bind(at).await?;
    say(&format!("echoing at {at}"));
    loop {
        let (from, datagram) = socket.recv_from_bytes().await?;
        socket.send_to(from, &datagram).await?;
    }
}

async fn send(
    device: &tailscale::Device,
    at: SocketAddr,
    to: SocketAddr,
    count: usize,
) -> Result<(), Box<dyn Error>> {
    let socket = Arc::new(device.udp_bind(at).await?);
    // One task receives and is never cancelled: a receive that is given up stays queued inside the crate and swallows
    // the next datagram.
    let (answers, mut answered_by) = mpsc::channel(64);
    let receiver = Arc::clone(&socket);
    tokio::spawn(async move {
        while let Ok((_, datagram)) = receiver.recv_from_bytes().await {
            if answers.send(datagram).await.is_err() {
                return;
            }
        }
    });
    let first = async {
        loop {
            socket.send_to(to, b"hello").await?;
            if let Ok(answer) = timeout(Duration::from_secs(1), answered_by.recv()).await {
                return answer.map(drop).ok_or_else(|| Box::<dyn Error>::from("the socket was closed"));
            }
        }
    };
    timeout(FIRST_ANSWER, first).await.map_err(|_| format!("no answer from {to} in {FIRST_ANSWER:?}"))??;
    let mut answered = 0;
    for number in 0..count {
        let text = format!("datagram {number}");
        socket.send_to(to, text.as_bytes()).await?;
        // Answers to the first datagrams may still be on their way: take what comes until it is this one's.
        while let Ok(Some(datagram)) = timeout(NEXT_ANSWER, answered_by.recv()).await {
            if datagram[..] == *text.as_bytes() {
                answered += 1;
                break;
            }
        }
    }
    say(&format!("answered {answered} of {count}"));
    if answered == count { Ok(()) } else { Err("some datagrams were not answered".into()) }
}

/// A line for the scenario to wait for, at once: standard output may be a file.
fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    // A reader that is gone is not this program's trouble.
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}
