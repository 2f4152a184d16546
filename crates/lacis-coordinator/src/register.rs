//! `POST /machine/register`: which of the ways to join, come back or leave a request means.
//!
//! The order of the questions is the protocol's (dossier, section 5.3): leaving, restarting, waiting for approval, a
//! key, and at last a page to sign in. Refusals are texts inside a 200, as clients expect them.

use lacis_serve::places::prefix;
use lacis_wire::control::{Login, RegisterRequest, RegisterResponse, User};

use crate::core::registration::{Applicant, Member, Refused};
use crate::core::{Core, now};
use crate::inner::Session;

/// Answers a registration.
pub async fn register(core: &Core, session: &Session, request: RegisterRequest) -> RegisterResponse {
    match decide(core, session, request).await {
        Ok(response) => response,
        // A client makes another key then and asks again.
        Err(Refused::OtherNode) => RegisterResponse { node_key_expired: true, ..RegisterResponse::default() },
        Err(refused @ (Refused::Store(_) | Refused::Random(_))) => {
            if let Some(suppressed) = core.log().allow("registration failed", ()) {
                let (machine, remote) = (session.machine, session.remote);
                tracing::error!(%machine, %remote, cause = lacis_serve::log::chain(&refused), suppressed, "registration failed");
            }
            RegisterResponse { error: refused.to_string(), ..RegisterResponse::default() }
        }
        Err(refused) => {
            if let Some(suppressed) = core.log().allow("registration refused", prefix(session.remote.ip())) {
                let (machine, remote) = (session.machine, session.remote);
                tracing::info!(%machine, %remote, %refused, suppressed, "registration refused");
            }
            RegisterResponse { error: refused.to_string(), ..RegisterResponse::default() }
        }
    }
}

async fn decide(
    core: &Core,
    session: &Session,
    request: RegisterRequest,
) -> Result<RegisterResponse, Refused> {
    let expiry = request.expiry.map(|at| at.unix_timestamp());
    let known = core.find(&request.node_key);
    if let Some(at) = expiry
        && at <= now()
    {
        let (core, session) = (core.clone(), *session);
        return to_the_end(async move { leave(&core, &session, known).await }).await;
    }
    let auth_key = request.auth.as_ref().map(|auth| auth.auth_key.as_str()).filter(|key| !key.is_empty());
    let applicant = Applicant {
        machine: session.machine,
        node_key: request.node_key,
        old_node_key: request.old_node_key,
        hostinfo: request.hostinfo.unwrap_or_default(),
        version: request.version,
        expiry,
    };
    if auth_key.is_none()
        && let Some((tailnet, node)) = &known
    {
        if node.machine_key != session.machine {
            return Err(Refused::ForeignKey);
        }
        if node.expired {
            return Ok(RegisterResponse {
                node_key_expired: true,
                ..success(&(tailnet.clone(), node.clone()))
            });
        }
        if expiry.is_some() {
            return Ok(RegisterResponse {
                error: "extending key is not allowed".to_owned(),
                ..RegisterResponse::default()
            });
        }
        // A restart: nothing about the key changes.
        return Ok(success(&core.refresh(tailnet, node, applicant)));
    }
    if let Some(key) = auth_key {
        let (core, key) = (core.clone(), zeroize::Zeroizing::new(key.to_owned()));
        let joined = to_the_end(async move { core.register_with_key(applicant, &key).await }).await?;
        return Ok(success(&joined));
    }
    // This may last for minutes, and anybody may wait: only what a registration keeps anyway is held meanwhile.
    let (followup, applicant) = (request.followup, applicant.without_host_facts());
    if !followup.is_empty() {
        core.wait_for_approval(&followup, &session.machine).await;
        if let Some(member) = core.find_for(&applicant.node_key, &session.machine) {
            return Ok(success(&member));
        }
    }
    let auth_url = core.begin_interactive(applicant, session.remote.ip())?;
    Ok(RegisterResponse { auth_url, ..RegisterResponse::default() })
}

/// Does this even when the client goes away meanwhile: what is written must also be known to the rest of the program.
async fn to_the_end<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> T {
    match tokio::spawn(work).await {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // Only the end of the runtime cancels it, and this task with it.
            Err(_) => std::future::pending().await,
        },
    }
}

async fn leave(core: &Core, session: &Session, known: Option<Member>) -> Result<RegisterResponse, Refused> {
    let gone = RegisterResponse { node_key_expired: true, ..RegisterResponse::default() };
    let Some((tailnet, node)) = known else { return Ok(gone) };
    if node.machine_key != session.machine {
        return Err(Refused::ForeignKey);
    }
    core.logout(&tailnet, &node).await?;
    Ok(RegisterResponse { machine_authorized: !node.ephemeral && !node.expired, ..gone })
}

fn success((tailnet, node): &Member) -> RegisterResponse {
    let profile = tailnet.snapshot().profile(node.user);
    RegisterResponse {
        user: User { id: profile.id, display_name: profile.display_name.clone(), ..User::default() },
        login: Login {
            id: profile.id,
            login_name: profile.login_name,
            display_name: profile.display_name,
            ..Login::default()
        },
        machine_authorized: true,
        ..RegisterResponse::default()
    }
}
