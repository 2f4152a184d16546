//! From the configuration to what the other parts are given.
