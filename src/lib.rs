//! Diptych: RAID-1 for Chroma.
//!
//! A Pingora proxy plugin that turns two plain Chroma servers into one highly available Chroma: reads go to healthy
//! nodes, writes are mirrored to every node in one order, and what a node misses is kept in a write-ahead log and
//! drained in order when it returns.

pub mod admin;
pub mod catalog;
pub mod chroma;
pub mod cli;
pub mod cluster;
pub mod config;
pub mod drain;
pub mod env;
pub mod events;
pub mod fault;
pub mod journal;
pub mod lane;
pub mod metrics;
pub mod mirror;
pub mod proxy;
pub mod repair;
