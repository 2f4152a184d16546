//! Placeholder of the packet path.
