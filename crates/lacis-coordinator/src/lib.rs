//! lacis-coordinator
