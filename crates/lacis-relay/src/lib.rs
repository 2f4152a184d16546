//! lacis-relay
