//! The demonstration (being written).
