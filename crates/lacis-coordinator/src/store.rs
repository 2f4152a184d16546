//! What outlives the process: users, auth keys, nodes and policies, in SQLite.
//!
//! The core keeps everything in memory and reads the database once, at the start. Writes go through one task that
//! owns the only connection: whatever waits when it is free becomes one transaction (so a hundred registrations cost
//! one `fsync`), each job under a savepoint of its own. Callers see [`Store::commit`] with [`Write`]s in domain types;
//! nothing of SQLite leaves this module, so that another database can stand behind it.

mod rows;
mod sqlite;

use std::path::PathBuf;

use lacis_policy::Role;
use tokio::sync::{mpsc, oneshot};

pub use rows::{AuthKeyRow, Loaded, NodeFacts, NodeRow, PolicyRow, UserRow};

/// Jobs that may wait for the writer. When it is full, whoever asks waits: nothing is lost.
const QUEUE: usize = 1024;

/// One change of the database.
#[derive(Clone, Debug)]
pub enum Write {
    InsertUser(UserRow),
    /// Another email address and other roles of the user with this id.
    ChangeUser {
        id: i64,
        email: Option<String>,
        roles: Vec<Role>,
    },
    DeleteUser(i64),
    InsertKey(AuthKeyRow),
    /// Spends a single-use key; the whole job fails with [`Error::KeyNotUsable`] when it is spent or revoked.
    SpendKey(String),
    RevokeKey(String),
    InsertNode(NodeRow),
    UpdateNode(NodeRow),
    DeleteNode(i64),
    /// In the place of the network's former one.
    SetPolicy(PolicyRow),
    /// Of the network with this name.
    DeletePolicy(String),
    /// Changes nothing that is read again, but goes to disk as the others do: only a disk that takes it is healthy.
    Probe,
}

/// Why the database could not be opened or changed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "cannot open the database {path}: {reason}; make the file and its folder readable and writable for this user"
    )]
    Open { path: PathBuf, reason: String },
    #[error(
        "the database {path} is damaged ({reason}); put a backup in its place, or move it away to begin anew"
    )]
    Corrupt { path: PathBuf, reason: String },
    #[error(
        "the database {path} is missing or empty, but this is not the first start: there is {key}; \
         put the database back from a backup, with its -wal file if there is one, \
         or start once with `serve --init` to begin an empty network"
    )]
    Missing { path: PathBuf, key: PathBuf },
    #[error("the database {path} was written by a newer version ({reason}); run that version or a newer one")]
    Newer { path: PathBuf, reason: String },
    #[error("the auth key {id} is used up or revoked")]
    KeyNotUsable { id: String },
    #[error("the database refused a change: {reason}")]
    Write { reason: String },
    #[error("the database's writer has stopped")]
    Stopped,
    #[error("the database could not be closed in good order, its -wal file belongs to it: {reason}")]
    Close { reason: String },
}

type Reply = oneshot::Sender<Result<(), Error>>;

#[derive(Debug)]
enum Job {
    /// All of these or none.
    Commit(Vec<Write>, Reply),
    /// The last one: what comes later is refused.
    Close(Reply),
}

/// Whether a database may be made where there is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Missing {
    Make,
    /// This key says that there was one.
    Refuse {
        key: PathBuf,
    },
}

/// The database; cheap to clone.
#[derive(Clone, Debug)]
pub struct Store {
    jobs: mpsc::Sender<Job>,
}

impl Store {
    /// Opens (or makes) the database and reads it.
    ///
    /// # Errors
    /// When it cannot be opened, is damaged, or was written by a newer version.
    pub async fn open(path: PathBuf) -> Result<(Self, Loaded), Error> {
        Self::open_or(path, Missing::Make).await
    }

    /// The same; `missing` says what to do where there is no database, or one without tables.
    ///
    /// # Errors
    /// As [`Self::open`], and [`Error::Missing`].
    pub async fn open_or(path: PathBuf, missing: Missing) -> Result<(Self, Loaded), Error> {
        let mut connection = sqlite::open(&path, missing).await?;
        let loaded = sqlite::load(&mut connection, &path).await?;
        let (jobs, queue) = mpsc::channel(QUEUE);
        tokio::spawn(sqlite::Writer::new(path, connection).run(queue));
        Ok((Self { jobs }, loaded))
    }

    /// Makes all of these changes or none, and returns when they are on disk.
    ///
    /// # Errors
    /// When the database refuses; nothing has changed then.
    pub async fn commit(&self, writes: Vec<Write>) -> Result<(), Error> {
        self.send(|reply| Job::Commit(writes, reply)).await
    }

    /// Writes what waits, moves everything from the write-ahead log into the file, and closes it. Later commits are
    /// refused with [`Error::Stopped`].
    ///
    /// # Errors
    /// When another process has the database open, or it cannot be written. What was committed is on disk all the same.
    pub async fn close(&self) -> Result<(), Error> {
        self.send(Job::Close).await
    }

    async fn send(&self, job: impl FnOnce(Reply) -> Job) -> Result<(), Error> {
        let (reply, result) = oneshot::channel();
        self.jobs.send(job(reply)).await.map_err(|_| Error::Stopped)?;
        result.await.map_err(|_| Error::Stopped)?
    }
}
