-- Routes that an administrator approved by hand, as a JSON list of prefixes: announced or not, they stay.
ALTER TABLE nodes ADD COLUMN approved_routes TEXT NOT NULL DEFAULT '[]';

-- The policy of a network whose configuration names no file and has none inline.
CREATE TABLE policies (
  tailnet  TEXT    PRIMARY KEY,
  -- As it was given, comments and all; `format` is hujson or yaml.
  text     TEXT    NOT NULL,
  format   TEXT    NOT NULL,
  changed  INTEGER NOT NULL
) STRICT;
