//! Work that no request asks for: each agent is a thread that waits and calls. The agents leave one
//! processor to the threads that serve.

pub mod collapse;
pub mod doors;
pub mod patrol;
pub mod policies;
pub mod rounds;
pub mod steward;
