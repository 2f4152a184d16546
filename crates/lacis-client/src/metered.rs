//! Does somebody pay for each byte? NetworkManager knows of many networks, for [`crate::links`]; where it does not run,
//! nobody knows.

use std::time::Duration;

use tokio::time::timeout;
use zbus::{Connection, OwnedVariant};

const NETWORK_MANAGER: &str = "org.freedesktop.NetworkManager";
/// Nothing may wait long for this.
const LIMIT: Duration = Duration::from_millis(500);
/// `NMMetered`: said by the user or the network, and guessed.
const METERED: [u32; 2] = [1, 3];

/// The question, with the bus on which it is asked.
#[derive(Debug)]
pub(crate) struct Metered(Option<Connection>);

impl Metered {
    pub(crate) async fn open() -> Self {
        Self(timeout(LIMIT, Connection::system()).await.ok().and_then(Result::ok))
    }

    /// Whether the way to the internet is metered, as far as it is known.
    pub(crate) async fn ask(&self) -> bool {
        let Some(bus) = &self.0 else { return false };
        let answer = timeout(LIMIT, async {
            // Without this, asking would start the service where it is not wanted.
            let running = bus
                .call_method(
                    Some("org.freedesktop.DBus"),
                    "/org/freedesktop/DBus",
                    Some("org.freedesktop.DBus"),
                    "NameHasOwner",
                    &NETWORK_MANAGER,
                )
                .await?;
            if !running.body().deserialize::<bool>()? {
                return Ok(false);
            }
            let metered = bus
                .call_method(
                    Some(NETWORK_MANAGER),
                    "/org/freedesktop/NetworkManager",
                    Some("org.freedesktop.DBus.Properties"),
                    "Get",
                    &(NETWORK_MANAGER, "Metered"),
                )
                .await?;
            let metered: u32 = metered.body().deserialize::<OwnedVariant>()?.try_into()?;
            Ok::<_, zbus::Error>(METERED.contains(&metered))
        });
        match answer.await {
            Ok(Ok(metered)) => metered,
            Ok(Err(error)) => {
                tracing::debug!(%error, "NetworkManager does not say whether the network is metered");
                false
            }
            Err(_) => false,
        }
    }
}
