//! lacis-dns
