-- By which a policy may call a user as well; of several users no two have the same, whatever its case.
ALTER TABLE users ADD COLUMN email TEXT;
-- What they are in the network, as a JSON list of names: "owner", "admin", ...
ALTER TABLE users ADD COLUMN roles TEXT NOT NULL DEFAULT '[]';

CREATE UNIQUE INDEX users_by_email ON users (tailnet, email COLLATE NOCASE);
