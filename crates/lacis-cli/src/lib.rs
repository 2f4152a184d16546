//! lacis-cli
