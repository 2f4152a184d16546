//! The administration API over the Unix socket: `lacis_wire::admin` has its types and paths, the core does the work.

use std::sync::Arc;

use axum::extract::rejection::JsonRejection;
use axum::extract::{FromRequest, MatchedPath, Path, Request, State};
use axum::http::{Method, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use lacis_policy::Population;
use lacis_wire::admin::{
    ApiError, ApproveRegistration, ApproveRoutes, ChangeUser, CreateKey, CreateUser, CreatedKey,
    DecideSshCheck, KeyInfo, NodeInfo, PREFIX, PolicyInfo, PolicyProblem, RegistrationInfo, RenameNode,
    SetPolicy, SetTags, SshCheckInfo, TailnetInfo, UserInfo,
};

use crate::core::registration::Refused;
use crate::core::tailnet::Tailnet;
use crate::core::{AdminError, Core, now};
use crate::fault;

/// Who is at the other end of the socket. The listener has checked that they may.
#[derive(Clone, Copy, Debug)]
pub struct AdminPeer {
    pub uid: u32,
    pub gid: u32,
}

type Answer<T> = Result<Json<T>, Failure>;

/// An error as the API says it.
struct Failure(StatusCode, ApiError);

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let Self(status, error) = self;
        if status.is_server_error() {
            return fault::with_cause(error.error.clone(), (status, Json(error)));
        }
        (status, Json(error)).into_response()
    }
}

impl From<AdminError> for Failure {
    fn from(error: AdminError) -> Self {
        let (status, hint) = match &error {
            AdminError::NotFound { what, .. } => {
                (StatusCode::NOT_FOUND, Some(format!("`lacis admin {what}s list` shows what there is")))
            }
            AdminError::NumberNotId { fqdn, id, .. } => {
                (StatusCode::CONFLICT, Some(format!("a number is taken for an id: use {id} or {fqdn}")))
            }
            AdminError::Exists { .. } => (StatusCode::CONFLICT, Some("choose another name".to_owned())),
            AdminError::HasNodes { name, .. } => (
                StatusCode::CONFLICT,
                Some(format!("delete the nodes of {name} first: `lacis admin nodes list`")),
            ),
            AdminError::UserOrTags => {
                (StatusCode::BAD_REQUEST, Some("give --user NAME or --tags tag:a,tag:b".to_owned()))
            }
            AdminError::BadName(_)
            | AdminError::BadUserName { .. }
            | AdminError::BadEmail(_)
            | AdminError::BadRole { .. }
            | AdminError::BadTag(_) => (StatusCode::BAD_REQUEST, None),
            AdminError::EmailTaken { .. } => (
                StatusCode::CONFLICT,
                Some("policies could not tell the two apart: choose another".to_owned()),
            ),
            AdminError::NoTags => (
                StatusCode::BAD_REQUEST,
                Some("to give a tagged node to a person, let it sign in again as theirs".to_owned()),
            ),
            AdminError::UnknownTag(_) => (
                StatusCode::BAD_REQUEST,
                Some("name it in the policy's tagOwners; its list may be empty".to_owned()),
            ),
            AdminError::BadPolicy(_) => (StatusCode::UNPROCESSABLE_ENTITY, None),
            AdminError::PolicyInFile { .. } => {
                (StatusCode::CONFLICT, Some("change the file: it is read as soon as it changes".to_owned()))
            }
            AdminError::PolicyInConfiguration => (
                StatusCode::CONFLICT,
                Some("change it there, then `systemctl reload lacis-coordinator`".to_owned()),
            ),
            AdminError::Refused(Refused::Tags(_)) => {
                (StatusCode::CONFLICT, Some("the policy's tagOwners must let the user give them".to_owned()))
            }
            AdminError::Refused(_) => (StatusCode::CONFLICT, None),
            AdminError::Store(_) | AdminError::Random(_) => (StatusCode::INTERNAL_SERVER_ERROR, None),
        };
        Self(status, ApiError { error: lacis_serve::log::chain(&error), hint })
    }
}

/// A JSON body whose faults are told in the API's own form.
struct Body<T>(T);

impl<S: Send + Sync, T: serde::de::DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, state: &S) -> Result<Self, Failure> {
        let body: Result<Json<T>, JsonRejection> = Json::from_request(request, state).await;
        match body {
            Ok(Json(body)) => Ok(Self(body)),
            Err(error) => Err(Failure(error.status(), ApiError { error: error.body_text(), hint: None })),
        }
    }
}

fn tailnet<'a>(core: &'a Core, name: &str) -> Result<&'a Arc<Tailnet>, Failure> {
    core.tailnet(name).ok_or_else(|| AdminError::NotFound { what: "tailnet", name: name.to_owned() }.into())
}

/// All of the API.
pub fn router(core: Core) -> Router {
    let routes = Router::new()
        .route("/tailnets", get(list_tailnets))
        .route("/tailnets/{tailnet}/users", get(list_users).post(create_user))
        .route("/tailnets/{tailnet}/users/{user}", delete(delete_user).patch(change_user))
        .route("/tailnets/{tailnet}/keys", get(list_keys).post(create_key))
        .route("/tailnets/{tailnet}/keys/{key}/expire", post(expire_key))
        .route("/tailnets/{tailnet}/nodes", get(list_nodes))
        .route("/tailnets/{tailnet}/nodes/{node}", get(show_node).delete(delete_node))
        .route("/tailnets/{tailnet}/nodes/{node}/rename", post(rename_node))
        .route("/tailnets/{tailnet}/nodes/{node}/expire", post(expire_node))
        .route("/tailnets/{tailnet}/nodes/{node}/approve-routes", post(approve_routes))
        .route("/tailnets/{tailnet}/nodes/{node}/tags", post(set_tags))
        .route("/tailnets/{tailnet}/policy", get(show_policy).put(set_policy).delete(delete_policy))
        .route("/tailnets/{tailnet}/policy/check", post(check_policy))
        .route("/tailnets/{tailnet}/policy/reload", post(reload_policy))
        .route("/tailnets/{tailnet}/population", get(population))
        .route("/registrations", get(list_registrations))
        .route("/registrations/{id}/approve", post(approve))
        .route("/ssh-checks", get(list_ssh_checks))
        .route("/ssh-checks/{id}", post(decide_ssh_check))
        .route_layer(middleware::from_fn(note))
        .layer(middleware::from_fn_with_state(Arc::clone(core.log()), fault::log))
        .with_state(core);
    Router::new().nest(PREFIX, routes).fallback(|| async {
        Failure(StatusCode::NOT_FOUND, ApiError { error: "no such path in this API".to_owned(), hint: None })
    })
}

/// Who changed what. The path is told as the API has it: a person may have put a whole key into it.
async fn note(request: Request, next: Next) -> Response {
    let method = request.method().clone();
    let path =
        request.extensions().get::<MatchedPath>().map_or_else(String::new, |path| path.as_str().into());
    let uid = request.extensions().get::<AdminPeer>().map(|peer| peer.uid);
    let answer = next.run(request).await;
    if method != Method::GET {
        tracing::info!(%method, path, uid, status = answer.status().as_u16(), "an administrator's command");
    }
    answer
}

async fn list_tailnets(State(core): State<Core>) -> Json<Vec<TailnetInfo>> {
    Json(core.list_tailnets())
}

async fn list_users(State(core): State<Core>, Path(name): Path<String>) -> Answer<Vec<UserInfo>> {
    Ok(Json(core.list_users(tailnet(&core, &name)?)))
}

async fn create_user(
    State(core): State<Core>,
    Path(name): Path<String>,
    Body(wish): Body<CreateUser>,
) -> Answer<UserInfo> {
    let tailnet = tailnet(&core, &name)?;
    Ok(Json(core.create_user(tailnet, &wish).await?))
}

async fn change_user(
    State(core): State<Core>,
    Path((name, user)): Path<(String, String)>,
    Body(wish): Body<ChangeUser>,
) -> Answer<UserInfo> {
    Ok(Json(core.change_user(tailnet(&core, &name)?, &user, &wish).await?))
}

async fn delete_user(State(core): State<Core>, Path((name, user)): Path<(String, String)>) -> Answer<()> {
    Ok(Json(core.delete_user(tailnet(&core, &name)?, &user).await?))
}

async fn list_keys(State(core): State<Core>, Path(name): Path<String>) -> Answer<Vec<KeyInfo>> {
    Ok(Json(core.list_keys(tailnet(&core, &name)?)))
}

async fn create_key(
    State(core): State<Core>,
    Path(name): Path<String>,
    Body(wish): Body<CreateKey>,
) -> Answer<CreatedKey> {
    Ok(Json(core.create_key(tailnet(&core, &name)?, &wish).await?))
}

async fn expire_key(State(core): State<Core>, Path((name, key)): Path<(String, String)>) -> Answer<()> {
    Ok(Json(core.expire_key(tailnet(&core, &name)?, &key).await?))
}

async fn list_nodes(State(core): State<Core>, Path(name): Path<String>) -> Answer<Vec<NodeInfo>> {
    Ok(Json(core.list_nodes(tailnet(&core, &name)?)))
}

async fn show_node(State(core): State<Core>, Path((name, node)): Path<(String, String)>) -> Answer<NodeInfo> {
    let tailnet = tailnet(&core, &name)?;
    Ok(Json(core.node_info(tailnet, &*core.node_meant(tailnet, &node)?)))
}

async fn rename_node(
    State(core): State<Core>,
    Path((name, node)): Path<(String, String)>,
    Body(wish): Body<RenameNode>,
) -> Answer<NodeInfo> {
    let tailnet = tailnet(&core, &name)?;
    let node = core.node_meant(tailnet, &node)?;
    Ok(Json(core.rename_node(tailnet, &node, &wish.name).await?))
}

async fn expire_node(State(core): State<Core>, Path((name, node)): Path<(String, String)>) -> Answer<()> {
    let tailnet = tailnet(&core, &name)?;
    let node = core.node_meant(tailnet, &node)?;
    Ok(Json(core.expire(tailnet, &node, now()).await.map_err(AdminError::from)?))
}

async fn approve_routes(
    State(core): State<Core>,
    Path((name, node)): Path<(String, String)>,
    Body(wish): Body<ApproveRoutes>,
) -> Answer<NodeInfo> {
    let tailnet = tailnet(&core, &name)?;
    let node = core.node_meant(tailnet, &node)?;
    Ok(Json(core.approve_routes(tailnet, &node, &wish.routes).await?))
}

async fn set_tags(
    State(core): State<Core>,
    Path((name, node)): Path<(String, String)>,
    Body(wish): Body<SetTags>,
) -> Answer<NodeInfo> {
    let tailnet = tailnet(&core, &name)?;
    let node = core.node_meant(tailnet, &node)?;
    Ok(Json(core.set_tags(tailnet, &node, &wish.tags).await?))
}

async fn show_policy(State(core): State<Core>, Path(name): Path<String>) -> Answer<PolicyInfo> {
    Ok(Json(core.policy(tailnet(&core, &name)?)))
}

async fn set_policy(
    State(core): State<Core>,
    Path(name): Path<String>,
    Body(wish): Body<SetPolicy>,
) -> Answer<PolicyInfo> {
    Ok(Json(core.set_policy(tailnet(&core, &name)?, &wish).await?))
}

async fn delete_policy(State(core): State<Core>, Path(name): Path<String>) -> Answer<PolicyInfo> {
    Ok(Json(core.delete_policy(tailnet(&core, &name)?).await?))
}

async fn check_policy(
    State(core): State<Core>,
    Path(name): Path<String>,
    Body(wish): Body<SetPolicy>,
) -> Answer<Vec<PolicyProblem>> {
    Ok(Json(core.check_policy(tailnet(&core, &name)?, &wish)?))
}

async fn reload_policy(State(core): State<Core>, Path(name): Path<String>) -> Answer<PolicyInfo> {
    Ok(Json(core.reload_policy(tailnet(&core, &name)?).await?))
}

async fn population(State(core): State<Core>, Path(name): Path<String>) -> Answer<Population> {
    Ok(Json(core.population(tailnet(&core, &name)?)))
}

async fn delete_node(State(core): State<Core>, Path((name, node)): Path<(String, String)>) -> Answer<()> {
    let tailnet = tailnet(&core, &name)?;
    let node = core.node_meant(tailnet, &node)?;
    Ok(Json(core.delete_node(tailnet, &node).await.map_err(AdminError::from)?))
}

async fn list_registrations(State(core): State<Core>) -> Json<Vec<RegistrationInfo>> {
    Json(core.list_registrations())
}

async fn list_ssh_checks(State(core): State<Core>) -> Json<Vec<SshCheckInfo>> {
    Json(core.list_ssh_checks())
}

async fn decide_ssh_check(
    State(core): State<Core>,
    Path(id): Path<String>,
    Body(wish): Body<DecideSshCheck>,
) -> Answer<()> {
    Ok(Json(core.decide_ssh_check(&id, wish.approve)?))
}

async fn approve(
    State(core): State<Core>,
    Path(id): Path<String>,
    Body(wish): Body<ApproveRegistration>,
) -> Answer<NodeInfo> {
    let tailnet = tailnet(&core, &wish.tailnet)?;
    Ok(Json(core.approve_registration(&id, tailnet, &wish.user).await?))
}
