//! lacis-wire
