//! The SQLite side of the store.

use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteRow, SqliteSynchronous};
use sqlx::{ConnectOptions as _, Connection as _, Row as _, SqliteConnection};
use tokio::sync::mpsc;

use super::rows::{AuthKeyRow, Loaded, NodeRow, PolicyRow, UserRow};
use super::{Error, Job, Missing, Reply, Write};

static MIGRATIONS: sqlx::migrate::Migrator = sqlx::migrate!();

/// Jobs of one transaction: enough to spread an `fsync`, few enough that nobody waits long.
const GROUP: usize = 256;
/// Who is in the network is nobody else's business.
const FILE_MODE: u32 = 0o600;
/// Another process (a backup) may hold the database for a moment.
const BUSY: Duration = Duration::from_secs(5);
/// The same at the end, when the program is waited for.
const BUSY_AT_CLOSE: &str = "PRAGMA busy_timeout = 1000";

/// What SQLite says of a file that is none of its own or is torn.
const SQLITE_CORRUPT: &str = "11";
const SQLITE_NOTADB: &str = "26";

fn open_error(path: &Path, error: &sqlx::Error) -> Error {
    let path = path.to_owned();
    let reason = match error {
        sqlx::Error::Database(inner) => {
            let code = inner.code().unwrap_or_default().into_owned();
            if code == SQLITE_CORRUPT || code == SQLITE_NOTADB {
                return Error::Corrupt { path, reason: inner.message().to_owned() };
            }
            inner.message().to_owned()
        }
        other => other.to_string(),
    };
    Error::Open { path, reason }
}

async fn connect(path: &Path) -> Result<SqliteConnection, sqlx::Error> {
    SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        // A key that was spent stays spent after a power cut.
        .synchronous(SqliteSynchronous::Full)
        .foreign_keys(true)
        .busy_timeout(BUSY)
        .statement_cache_capacity(32)
        .disable_statement_logging()
        .connect()
        .await
}

/// Is there nothing that SQLite would read?
fn is_empty_file(path: &Path) -> bool {
    match std::fs::metadata(path) {
        Ok(data) => data.len() == 0,
        // Anything else is said when it is opened.
        Err(error) => error.kind() == std::io::ErrorKind::NotFound,
    }
}

pub(super) async fn open(path: &Path, missing: Missing) -> Result<SqliteConnection, Error> {
    let refuse = |key: &PathBuf| Error::Missing { path: path.to_owned(), key: key.clone() };
    // Before anything is touched: beside an empty file SQLite deletes a write-ahead log, which may have everything.
    if let Missing::Refuse { key } = &missing
        && is_empty_file(path)
    {
        return Err(refuse(key));
    }
    // SQLite gives its other files the permissions of this one. What fails here fails again below, with more to say.
    let _ = std::fs::OpenOptions::new().append(true).create(true).mode(FILE_MODE).open(path);
    let mut connection = connect(path).await.map_err(|error| open_error(path, &error))?;
    let answer: String = sqlx::query_scalar("PRAGMA quick_check(1)")
        .fetch_one(&mut connection)
        .await
        .map_err(|error| open_error(path, &error))?;
    if answer != "ok" {
        return Err(Error::Corrupt { path: path.to_owned(), reason: answer });
    }
    if let Missing::Refuse { key } = &missing {
        let tables: i64 = sqlx::query_scalar("SELECT count(*) FROM sqlite_schema WHERE name = 'nodes'")
            .fetch_one(&mut connection)
            .await
            .map_err(|error| open_error(path, &error))?;
        if tables == 0 {
            return Err(refuse(key));
        }
    }
    MIGRATIONS.run_direct(None, &mut connection, false).await.map_err(|error| match error {
        sqlx::migrate::MigrateError::VersionMissing(version) => {
            Error::Newer { path: path.to_owned(), reason: format!("migration {version} is unknown here") }
        }
        sqlx::migrate::MigrateError::Execute(error) => open_error(path, &error),
        other => Error::Open { path: path.to_owned(), reason: other.to_string() },
    })?;
    Ok(connection)
}

/// A column that does not hold what the program wrote there.
fn damaged<E: std::fmt::Display>(path: &Path, what: &'static str) -> impl Fn(E) -> Error {
    move |error| Error::Corrupt { path: path.to_owned(), reason: format!("{what}: {error}") }
}

fn text<T: FromStr>(row: &SqliteRow, column: &'static str, path: &Path) -> Result<T, Error>
where
    T::Err: std::fmt::Display,
{
    let text: &str = row.try_get(column).map_err(damaged(path, column))?;
    text.parse().map_err(damaged(path, column))
}

fn json<T: serde::de::DeserializeOwned>(
    row: &SqliteRow,
    column: &'static str,
    path: &Path,
) -> Result<T, Error> {
    let text: &str = row.try_get(column).map_err(damaged(path, column))?;
    serde_json::from_str(text).map_err(damaged(path, column))
}

pub(super) async fn load(connection: &mut SqliteConnection, path: &Path) -> Result<Loaded, Error> {
    let mut loaded = Loaded::default();
    let failed = |error: sqlx::Error| open_error(path, &error);
    for row in
        sqlx::query("SELECT * FROM users ORDER BY id").fetch_all(&mut *connection).await.map_err(failed)?
    {
        loaded.users.push(UserRow {
            id: row.try_get("id").map_err(failed)?,
            tailnet: row.try_get("tailnet").map_err(failed)?,
            name: row.try_get("name").map_err(failed)?,
            display_name: row.try_get("display_name").map_err(failed)?,
            email: row.try_get("email").map_err(failed)?,
            roles: json(&row, "roles", path)?,
            created: row.try_get("created").map_err(failed)?,
        });
    }
    for row in sqlx::query("SELECT * FROM auth_keys").fetch_all(&mut *connection).await.map_err(failed)? {
        let hash: Vec<u8> = row.try_get("hash").map_err(failed)?;
        loaded.keys.push(AuthKeyRow {
            id: row.try_get("id").map_err(failed)?,
            tailnet: row.try_get("tailnet").map_err(failed)?,
            hash: hash.try_into().map_err(|_| damaged(path, "hash")("not 32 bytes"))?,
            user: row.try_get("user_id").map_err(failed)?,
            tags: json(&row, "tags", path)?,
            reusable: row.try_get("reusable").map_err(failed)?,
            ephemeral: row.try_get("ephemeral").map_err(failed)?,
            used: row.try_get("used").map_err(failed)?,
            revoked: row.try_get("revoked").map_err(failed)?,
            created: row.try_get("created").map_err(failed)?,
            expires: row.try_get("expires").map_err(failed)?,
        });
    }
    for row in
        sqlx::query("SELECT * FROM nodes ORDER BY id").fetch_all(&mut *connection).await.map_err(failed)?
    {
        loaded.nodes.push(NodeRow {
            id: row.try_get("id").map_err(failed)?,
            tailnet: row.try_get("tailnet").map_err(failed)?,
            node_key: text(&row, "node_key", path)?,
            machine_key: text(&row, "machine_key", path)?,
            user: row.try_get("user_id").map_err(failed)?,
            name: row.try_get("name").map_err(failed)?,
            name_is_given: row.try_get("name_is_given").map_err(failed)?,
            v4: text(&row, "v4", path)?,
            v6: text(&row, "v6", path)?,
            auth_key: row.try_get("auth_key").map_err(failed)?,
            approved_routes: json(&row, "approved_routes", path)?,
            created: row.try_get("created").map_err(failed)?,
            record: json(&row, "record", path)?,
        });
    }
    for row in sqlx::query("SELECT * FROM policies").fetch_all(&mut *connection).await.map_err(failed)? {
        loaded.policies.push(PolicyRow {
            tailnet: row.try_get("tailnet").map_err(failed)?,
            text: row.try_get("text").map_err(failed)?,
            format: row.try_get("format").map_err(failed)?,
            changed: row.try_get("changed").map_err(failed)?,
        });
    }
    for row in sqlx::query("SELECT name, seq FROM sqlite_sequence")
        .fetch_all(&mut *connection)
        .await
        .map_err(failed)?
    {
        let table: String = row.try_get("name").map_err(failed)?;
        let last: i64 = row.try_get("seq").map_err(failed)?;
        match table.as_str() {
            "users" => loaded.last_user = last,
            "nodes" => loaded.last_node = last,
            _ => {}
        }
    }
    Ok(loaded)
}

/// The only one who writes.
pub(super) struct Writer {
    path: PathBuf,
    /// `None` after a failed transaction: SQLite may have rolled it back by itself or not, and a connection that is
    /// still inside it would take the next changes, say yes, and never commit them.
    connection: Option<SqliteConnection>,
}

impl Writer {
    pub(super) fn new(path: PathBuf, connection: SqliteConnection) -> Self {
        Self { path, connection: Some(connection) }
    }

    /// Writes what comes until it is told to close, or nobody can send any more.
    pub(super) async fn run(mut self, mut queue: mpsc::Receiver<Job>) {
        let closing = loop {
            let mut group = Vec::new();
            let mut next = queue.recv().await;
            let end = loop {
                match next {
                    Some(Job::Commit(writes, reply)) => group.push((writes, reply)),
                    Some(Job::Close(reply)) => break Some(Some(reply)),
                    None => break Some(None),
                }
                if group.len() == GROUP {
                    break None;
                }
                match queue.try_recv() {
                    Ok(job) => next = Some(job),
                    // If nobody can send any more, the next turn finds out.
                    Err(_) => break None,
                }
            };
            if !group.is_empty() {
                self.commit(group).await;
            }
            if let Some(closing) = end {
                break closing;
            }
        };
        drop(queue);
        let closed = self.close().await;
        match closing {
            Some(reply) => {
                let _ = reply.send(closed);
            }
            None => {
                if let Err(error) = closed {
                    tracing::warn!(%error, "closing the database");
                }
            }
        }
    }

    async fn commit(&mut self, group: Vec<(Vec<Write>, Reply)>) {
        let mut results = Vec::with_capacity(group.len());
        let outcome = self.try_commit(&group, &mut results).await;
        for (index, (_, reply)) in group.into_iter().enumerate() {
            let result = match &outcome {
                Ok(()) => results.get(index).cloned().unwrap_or(Err(Error::Stopped)),
                Err(error) => Err(Error::Write { reason: error.to_string() }),
            };
            // Nobody waits any more when the request was cancelled; the change stands all the same.
            let _ = reply.send(result);
        }
    }

    async fn try_commit(
        &mut self,
        group: &[(Vec<Write>, Reply)],
        results: &mut Vec<Result<(), Error>>,
    ) -> Result<(), sqlx::Error> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => connect(&self.path).await?,
        };
        let outcome = transaction(&mut connection, group, results).await;
        if outcome.is_ok() {
            self.connection = Some(connection);
        } else if let Err(error) = connection.close().await {
            tracing::debug!(%error, "closing the database after a failed change");
        }
        outcome
    }

    /// Leaves the whole database in its one file, as people copy it.
    async fn close(self) -> Result<(), Error> {
        let failed = |error: sqlx::Error| Error::Close { reason: error.to_string() };
        let mut connection = match self.connection {
            Some(connection) => connection,
            None => connect(&self.path).await.map_err(failed)?,
        };
        sqlx::query(BUSY_AT_CLOSE).execute(&mut connection).await.map_err(failed)?;
        let busy: i64 = sqlx::query("PRAGMA wal_checkpoint(TRUNCATE)")
            .fetch_one(&mut connection)
            .await
            .and_then(|row| row.try_get(0))
            .map_err(failed)?;
        connection.close().await.map_err(failed)?;
        if busy != 0 {
            return Err(Error::Close { reason: "another program has the database open".to_owned() });
        }
        Ok(())
    }
}

async fn transaction(
    connection: &mut SqliteConnection,
    group: &[(Vec<Write>, Reply)],
    results: &mut Vec<Result<(), Error>>,
) -> Result<(), sqlx::Error> {
    let mut transaction = connection.begin().await?;
    for (writes, _) in group {
        let mut savepoint = transaction.begin().await?;
        let mut result = Ok(());
        for write in writes {
            result = apply(&mut savepoint, write).await;
            if result.is_err() {
                break;
            }
        }
        if result.is_ok() {
            savepoint.commit().await?;
        } else {
            savepoint.rollback().await?;
        }
        results.push(result);
    }
    transaction.commit().await
}

async fn apply(connection: &mut SqliteConnection, write: &Write) -> Result<(), Error> {
    let refused = |error: sqlx::Error| Error::Write { reason: error.to_string() };
    let query = match write {
        Write::InsertUser(user) => sqlx::query(
            "INSERT INTO users (id, tailnet, name, display_name, email, roles, created) \
             VALUES (?, ?, ?, ?, ?, ?, ?)",
        )
        .bind(user.id)
        .bind(&user.tailnet)
        .bind(&user.name)
        .bind(&user.display_name)
        .bind(&user.email)
        .bind(to_json(&user.roles)?)
        .bind(user.created),
        Write::ChangeUser { id, email, roles } => {
            sqlx::query("UPDATE users SET email = ?, roles = ? WHERE id = ?")
                .bind(email)
                .bind(to_json(roles)?)
                .bind(id)
        }
        Write::DeleteUser(id) => sqlx::query("DELETE FROM users WHERE id = ?").bind(id),
        Write::InsertKey(key) => sqlx::query(
            "INSERT INTO auth_keys (id, tailnet, hash, user_id, tags, reusable, ephemeral, used, revoked, created, expires) \
             VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        )
        .bind(&key.id)
        .bind(&key.tailnet)
        .bind(key.hash.to_vec())
        .bind(key.user)
        .bind(to_json(&key.tags)?)
        .bind(key.reusable)
        .bind(key.ephemeral)
        .bind(key.used)
        .bind(key.revoked)
        .bind(key.created)
        .bind(key.expires),
        Write::SpendKey(id) => {
            let done = sqlx::query(
                "UPDATE auth_keys SET used = 1 WHERE id = ? AND revoked = 0 AND (reusable = 1 OR used = 0)",
            )
            .bind(id)
            .execute(connection)
            .await
            .map_err(refused)?;
            return if done.rows_affected() == 1 { Ok(()) } else { Err(Error::KeyNotUsable { id: id.clone() }) };
        }
        Write::RevokeKey(id) => sqlx::query("UPDATE auth_keys SET revoked = 1 WHERE id = ?").bind(id),
        Write::InsertNode(node) => sqlx::query(
            "INSERT INTO nodes (node_key, machine_key, user_id, name, name_is_given, auth_key, approved_routes, record, id, tailnet, v4, v6, created) \
             VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        )
        .bind(node.node_key.to_string())
        .bind(node.machine_key.to_string())
        .bind(node.user)
        .bind(&node.name)
        .bind(node.name_is_given)
        .bind(&node.auth_key)
        .bind(to_json(&node.approved_routes)?)
        .bind(to_json(&node.record)?)
        .bind(node.id)
        .bind(&node.tailnet)
        .bind(node.v4.to_string())
        .bind(node.v6.to_string())
        .bind(node.created),
        Write::UpdateNode(node) => sqlx::query(
            "UPDATE nodes SET node_key = ?, machine_key = ?, user_id = ?, name = ?, name_is_given = ?, auth_key = ?, approved_routes = ?, record = ? \
             WHERE id = ?",
        )
        .bind(node.node_key.to_string())
        .bind(node.machine_key.to_string())
        .bind(node.user)
        .bind(&node.name)
        .bind(node.name_is_given)
        .bind(&node.auth_key)
        .bind(to_json(&node.approved_routes)?)
        .bind(to_json(&node.record)?)
        .bind(node.id),
        Write::DeleteNode(id) => sqlx::query("DELETE FROM nodes WHERE id = ?").bind(id),
        Write::SetPolicy(policy) => sqlx::query(
            "INSERT OR REPLACE INTO policies (tailnet, text, format, changed) VALUES (?, ?, ?, ?)",
        )
        .bind(&policy.tailnet)
        .bind(&policy.text)
        .bind(&policy.format)
        .bind(policy.changed),
        Write::DeletePolicy(tailnet) => sqlx::query("DELETE FROM policies WHERE tailnet = ?").bind(tailnet),
        // A number in the file's header that is the application's, and has no other use here.
        Write::Probe => sqlx::query("PRAGMA user_version = 1"),
    };
    query.execute(connection).await.map_err(refused)?;
    Ok(())
}

fn to_json<T: serde::Serialize>(value: &T) -> Result<String, Error> {
    serde_json::to_string(value).map_err(|error| Error::Write { reason: error.to_string() })
}

#[cfg(test)]
mod tests {
    use super::super::Store;
    use super::*;

    fn key(id: &str) -> AuthKeyRow {
        AuthKeyRow {
            id: id.to_owned(),
            tailnet: "lab".to_owned(),
            hash: [7; 32],
            user: None,
            tags: vec!["tag:a".to_owned()],
            reusable: false,
            ephemeral: false,
            used: false,
            revoked: false,
            created: 1,
            expires: None,
        }
    }

    #[tokio::test]
    async fn what_was_written_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("db.sqlite");
        let (store, loaded) = Store::open(path.clone()).await.unwrap();
        assert!(loaded.keys.is_empty());
        store.commit(vec![Write::InsertKey(key("k1"))]).await.unwrap();
        store.commit(vec![Write::SpendKey("k1".to_owned())]).await.unwrap();
        drop(store);
        let (_, loaded) = Store::open(path).await.unwrap();
        assert_eq!(loaded.keys, [AuthKeyRow { used: true, ..key("k1") }]);
    }

    #[tokio::test]
    async fn a_closed_database_is_whole_in_its_one_file_and_takes_nothing_more() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("db.sqlite");
        let (store, _) = Store::open(path.clone()).await.unwrap();
        let other = store.clone();
        // What is waiting when it is closed is written too.
        let (written, closed) = tokio::join!(store.commit(vec![Write::InsertKey(key("k1"))]), store.close());
        written.unwrap();
        closed.unwrap();
        assert!(!folder.path().join("db.sqlite-wal").exists());
        let late = other.commit(vec![Write::InsertKey(key("k2"))]).await;
        assert!(matches!(late, Err(Error::Stopped)), "{late:?}");
        assert!(matches!(other.close().await, Err(Error::Stopped)));
        let copy = folder.path().join("copy.sqlite");
        std::fs::copy(&path, &copy).unwrap();
        let (_, loaded) = Store::open(copy).await.unwrap();
        assert_eq!(loaded.keys, [key("k1")]);
    }

    #[tokio::test]
    async fn a_database_that_another_program_holds_says_so_at_the_close_and_loses_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("db.sqlite");
        let (store, _) = Store::open(path.clone()).await.unwrap();
        let mut reader = SqliteConnectOptions::new().filename(&path).connect().await.unwrap();
        let mut reading = reader.begin().await.unwrap();
        sqlx::query("SELECT * FROM users").fetch_all(&mut *reading).await.unwrap();
        store.commit(vec![Write::InsertKey(key("k1"))]).await.unwrap();
        let closed = store.close().await;
        assert!(matches!(closed, Err(Error::Close { .. })), "{closed:?}");
        reading.commit().await.unwrap();
        reader.close().await.unwrap();
        let (_, loaded) = Store::open(path).await.unwrap();
        assert_eq!(loaded.keys, [key("k1")]);
    }

    #[tokio::test]
    async fn a_database_that_cannot_be_written_fails_the_probe() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("db.sqlite");
        let mut connection = open(&path, Missing::Make).await.unwrap();
        let wal = || std::fs::metadata(folder.path().join("db.sqlite-wal")).map_or(0, |data| data.len());
        let before = wal();
        let mut results = Vec::new();
        let probe = || {
            let (reply, _) = tokio::sync::oneshot::channel();
            [(vec![Write::Probe], reply)]
        };
        transaction(&mut connection, &probe(), &mut results).await.unwrap();
        assert!(results.pop().unwrap().is_ok() && wal() > before, "it goes to disk");
        sqlx::query("PRAGMA query_only = 1").execute(&mut connection).await.unwrap();
        transaction(&mut connection, &probe(), &mut results).await.unwrap();
        assert!(matches!(results.pop(), Some(Err(Error::Write { .. }))));
    }

    #[tokio::test]
    async fn a_database_is_made_where_one_is_missing_only_if_that_is_meant() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("db.sqlite");
        let refuse = || Missing::Refuse { key: folder.path().join("noise.key") };
        let missing = |result: Result<_, Error>| matches!(result, Err(Error::Missing { .. }));
        assert!(missing(Store::open_or(path.clone(), refuse()).await));
        assert!(!path.exists(), "nothing was made");
        // Beside an empty file there may be a write-ahead log with everything in it: it stays.
        std::fs::write(&path, "").unwrap();
        std::fs::write(folder.path().join("db.sqlite-wal"), "all of it").unwrap();
        assert!(missing(Store::open_or(path.clone(), refuse()).await));
        assert_eq!(std::fs::read_to_string(folder.path().join("db.sqlite-wal")).unwrap(), "all of it");
        std::fs::remove_file(folder.path().join("db.sqlite-wal")).unwrap();
        // What is left of a copy of the file alone while a program runs: a header, and no tables.
        let header = SqliteConnectOptions::new().filename(&path).journal_mode(SqliteJournalMode::Wal);
        header.connect().await.unwrap().close().await.unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 4096);
        assert!(missing(Store::open_or(path.clone(), refuse()).await));
        Store::open_or(path.clone(), Missing::Make).await.unwrap().0.close().await.unwrap();
        Store::open_or(path, refuse()).await.unwrap();
    }

    #[tokio::test]
    async fn a_job_that_fails_leaves_nothing_and_hurts_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let (store, _) = Store::open(folder.path().join("db.sqlite")).await.unwrap();
        store.commit(vec![Write::InsertKey(key("k1"))]).await.unwrap();
        let spend = || store.commit(vec![Write::SpendKey("k1".to_owned())]);
        let (first, second, other) =
            tokio::join!(spend(), spend(), store.commit(vec![Write::InsertKey(key("k2"))]));
        assert!(first.is_ok());
        assert!(matches!(second, Err(Error::KeyNotUsable { .. })));
        assert!(other.is_ok());
    }

    #[tokio::test]
    async fn a_file_that_is_no_database_is_called_damaged() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("db.sqlite");
        std::fs::write(&path, vec![b'x'; 4096]).unwrap();
        let error = Store::open(path).await.unwrap_err();
        assert!(matches!(error, Error::Corrupt { .. }), "{error}");
    }
}
