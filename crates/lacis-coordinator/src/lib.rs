//! The control plane: who is in the network, with which keys, addresses, names and rules.
//!
//! Edge: [`config`] (the file), [`serve`] (start, run, stop), [`outer`] (what anybody may ask), [`ts2021`] (Noise, then HTTP/2), `admin_socket`.
//! Inside: [`store`] (SQLite), [`core`] (snapshots and their changes), [`inner`] (the router behind
//! Noise), with [`register`] and [`map`], and [`admin`] (the Unix socket's router).

pub mod admin;
pub mod config;
pub mod core;
pub mod inner;
pub mod map;
pub mod outer;
pub mod register;
pub mod serve;
pub mod store;
pub mod ts2021;

mod admin_socket;
mod error;
mod fault;
mod unix_peer;

pub use error::Error;
