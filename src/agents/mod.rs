//! Work that no request asks for: each agent is a thread that waits and calls.

pub mod collapse;
pub mod patrol;
