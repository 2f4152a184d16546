//! lacis-lab
