//! What administrators say and what it means: ids and names, tags of keys, and two who decide about the same.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use common::program::Api;
use common::{Server, of_alice};
use lacis_coordinator::core::AdminError;
use lacis_wire::admin::{CreateKey, PolicyFormat, SetPolicy};
use serde_json::Value;

#[tokio::test(flavor = "multi_thread")]
async fn a_number_is_the_id_of_a_node_and_never_its_name() {
    let server = Server::start().await;
    let key = server.key("lab", of_alice(true)).await;
    let lab = server.core.tailnet("lab").unwrap().clone();
    for hostname in ["2", "12", "007"] {
        server.machine(hostname).await.register(Some(&key)).await;
    }
    let id = |meant: &str| server.core.node_meant(&lab, meant).map(|node| node.id.0);
    assert_eq!((id("1").unwrap(), id("2").unwrap()), (1, 2), "the first is called 2");
    assert_eq!((id("2.lab.example.com").unwrap(), id("12.lab.example.com.").unwrap()), (1, 2));
    assert_eq!(id("007").unwrap(), 3, "ids are not written so");
    for number in ["12", "12."] {
        let error = id(number).unwrap_err();
        assert!(matches!(error, AdminError::NumberNotId { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains("12.lab.example.com") && text.contains("the id 2"), "{text}");
    }
    for nothing in ["4", "+1", "-1", "01", ""] {
        assert!(matches!(id(nothing), Err(AdminError::NotFound { .. })), "{nothing}");
    }
    // A command that is repeated hits nobody else.
    let api = Api::of(&server.state());
    let delete = || api.send("DELETE", "/tailnets/lab/nodes/2", Value::Null);
    assert_eq!(delete().await.unwrap().0, 200);
    let (status, answer) = delete().await.unwrap();
    assert_eq!(status, 409, "{answer}");
    assert!(answer["hint"].as_str().unwrap().contains("use 1 or 2.lab.example.com"), "{answer}");
    assert_eq!(lab.snapshot().nodes.len(), 2);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_has_only_tags_that_a_node_could_be_given() {
    let server = Server::start().await;
    let key = server.key("lab", of_alice(true)).await;
    let lab = server.core.tailnet("lab").unwrap().clone();
    server.machine("a").await.register(Some(&key)).await;
    let node = server.core.node_meant(&lab, "a").unwrap();
    let policy = r#"{"tagOwners": {"tag:web": []}, "acls": []}"#;
    let policy = SetPolicy { text: policy.into(), format: PolicyFormat::Hujson, name: None };
    server.core.set_policy(&lab, &policy).await.unwrap();
    for tags in [vec!["tag:wbe"], vec!["tag:web", "tag:db"], vec!["web"], vec!["tag:a b"], vec!["tag:web"]] {
        let tags: Vec<String> = tags.into_iter().map(Into::into).collect();
        let wish = CreateKey { tags: tags.clone(), ..CreateKey::default() };
        let made = server.core.create_key(&lab, &wish).await.map(|_| ()).map_err(|error| error.to_string());
        let set = server.core.set_tags(&lab, &node, &tags).await.map(|_| ());
        assert_eq!(made, set.map_err(|error| error.to_string()), "{tags:?}");
        assert_eq!(made.is_ok(), tags == ["tag:web"], "{tags:?}");
    }
    let twice = vec!["tag:web".to_owned(), "tag:web".to_owned()];
    let made = server.core.create_key(&lab, &CreateKey { tags: twice, ..CreateKey::default() }).await;
    assert_eq!(made.unwrap().info.tags, ["tag:web"]);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_who_approve_one_registration_one_does() {
    let server = Server::start().await;
    server.key("lab", of_alice(true)).await;
    let lab = server.core.tailnet("lab").unwrap().clone();
    let url = server.machine("a").await.register(None).await.auth_url;
    let approve = || server.core.approve_registration(&url, &lab, "alice");
    let (one, two) = tokio::join!(approve(), approve());
    assert_eq!(usize::from(one.is_ok()) + usize::from(two.is_ok()), 1);
    assert!(matches!(one.and(two), Err(AdminError::NotFound { .. })));
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_for_a_user_who_is_deleted_at_once_is_deleted_too() {
    let server = Server::start().await;
    let lab = server.core.tailnet("lab").unwrap().clone();
    for _ in 0..20 {
        server.core.create_user(&lab, &common::user_called("alice")).await.unwrap();
        let wish = of_alice(true);
        let (_, deleted) =
            tokio::join!(server.core.create_key(&lab, &wish), server.core.delete_user(&lab, "alice"));
        deleted.unwrap();
        assert!(server.core.list_keys(&lab).is_empty());
    }
    server.end().await;
}
