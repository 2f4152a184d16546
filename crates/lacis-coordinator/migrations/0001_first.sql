-- Ids are never used again (AUTOINCREMENT): clients and logs remember them.
CREATE TABLE users (
  id            INTEGER PRIMARY KEY AUTOINCREMENT,
  tailnet       TEXT    NOT NULL,
  name          TEXT    NOT NULL,
  display_name  TEXT    NOT NULL,
  created       INTEGER NOT NULL,
  UNIQUE (tailnet, name)
) STRICT;

CREATE TABLE auth_keys (
  id         TEXT    PRIMARY KEY,
  tailnet    TEXT    NOT NULL,
  hash       BLOB    NOT NULL,
  user_id    INTEGER REFERENCES users (id) ON DELETE CASCADE,
  tags       TEXT    NOT NULL,
  reusable   INTEGER NOT NULL,
  ephemeral  INTEGER NOT NULL,
  used       INTEGER NOT NULL DEFAULT 0,
  revoked    INTEGER NOT NULL DEFAULT 0,
  created    INTEGER NOT NULL,
  expires    INTEGER,
  CHECK ((user_id IS NULL) <> (tags = '[]'))
) STRICT;

CREATE TABLE nodes (
  id            INTEGER PRIMARY KEY AUTOINCREMENT,
  tailnet       TEXT    NOT NULL,
  node_key      TEXT    NOT NULL UNIQUE,
  machine_key   TEXT    NOT NULL,
  user_id       INTEGER REFERENCES users (id),
  name          TEXT    NOT NULL,
  name_is_given INTEGER NOT NULL,
  v4            TEXT    NOT NULL,
  v6            TEXT    NOT NULL,
  auth_key      TEXT,
  -- What the node told of itself and what may be lost without harm, as JSON.
  record        TEXT    NOT NULL,
  created       INTEGER NOT NULL,
  UNIQUE (tailnet, v4),
  UNIQUE (tailnet, v6)
) STRICT;

CREATE INDEX nodes_by_machine ON nodes (machine_key);
