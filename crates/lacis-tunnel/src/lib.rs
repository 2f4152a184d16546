//! lacis-tunnel
