//! lacis-client
