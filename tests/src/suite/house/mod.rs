//! The house is as docs/decisions/0029 and 0030 say: which room and which folder may know which, no circles of files, and
//! no file that is too long.

mod documents;
mod imports;
mod lengths;
mod manifests;
mod sources;
