//! Histories of clients and subscribers, recorded and checked: is there an order that explains all answers, and is what
//! subscribers were told true, in order and complete?
//!
//! [`history`] is what is recorded, [`linear`] and [`watch`] check it, whoever recorded it. [`nodes`] records and checks one of
//! several nodes in front of one engine, and [`net`] parts the members of that.

pub mod history;
pub mod linear;
pub mod net;
pub mod nodes;
pub mod watch;
