# Sourced by the other scripts: where programs are, and which Rust.
# shellcheck shell=bash

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Where rustup puts programs, and where an ordinary user's PATH does not look for the system's.
PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH:/usr/local/sbin:/usr/sbin:/sbin"
export PATH
# The oldest Rust that the workspace is built with.
RUST_WANTED=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$ROOT/Cargo.toml")

say() { printf '\n== %s\n' "$*"; }

die() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 1
}

# version_is_enough HAVE WANTED
version_is_enough() {
    [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1)" = "$2" ]
}

rust_version() { cargo --version 2>/dev/null | cut -d ' ' -f 2; }

# A toolchain of rustup's that the user has not made the default: scripts/setup installs it, the others take it.
if command -v rustup >/dev/null && ! version_is_enough "$(rust_version)" "$RUST_WANTED"; then
    export RUSTUP_TOOLCHAIN="$RUST_WANTED"
fi
