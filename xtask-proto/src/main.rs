//! Generates the Rust of `nkv-grpc` and `nkv-engine-etcd` from their `.proto` files, without `protoc`.
//!
//! ```text
//! cargo run -p xtask-proto       # after a change of a .proto file
//! cargo test -p xtask-proto      # whether what is in the repository is what the files give
//! ```
//!
//! It is a package of its own, because those crates themselves do not build while the two differ.

use std::error::Error;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use prost::Message;
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorSet};

const PROTOS: [&str; 2] = ["nkv/v1/kv.proto", "kv.proto"];

type AnyError = Box<dyn Error>;

fn main() -> Result<(), AnyError> {
    if std::env::args().any(|argument| argument == "--published") {
        print!("{}", summary(&compile()?)?);
        return Ok(());
    }
    for (path, contents) in generate()? {
        let path = here(&path);
        if fs::read(&path).ok().as_ref() != Some(&contents) {
            fs::write(&path, contents)?;
            println!("written: {}", path.display());
        }
    }
    Ok(())
}

fn here(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates").join(path)
}

/// All that is generated: paths in `crates`, and what the files hold.
fn generate() -> Result<Vec<(String, Vec<u8>)>, AnyError> {
    let mut files = generate_door()?;
    files.push(generate_etcd()?);
    Ok(files)
}

/// The client of etcd: its own crate for that wants `protoc` wherever it is built.
fn generate_etcd() -> Result<(String, Vec<u8>), AnyError> {
    let mut compiler = protox::Compiler::new([here("nkv-engine-etcd/proto")])?;
    compiler.include_source_info(true).open_files(["etcd.proto"])?;
    let out = tempfile::tempdir()?;
    tonic_prost_build::configure()
        .out_dir(out.path())
        .bytes(".")
        .build_server(false)
        .build_transport(false)
        .emit_rerun_if_changed(false)
        .compile_fds(compiler.file_descriptor_set())?;
    let path = "nkv-engine-etcd/src/generated/etcdserverpb.rs";
    Ok((path.into(), fs::read(out.path().join("etcdserverpb.rs"))?))
}

fn generate_door() -> Result<Vec<(String, Vec<u8>)>, AnyError> {
    let set = compile()?;
    let out = tempfile::tempdir()?;
    tonic_prost_build::configure()
        .out_dir(out.path())
        .bytes(".")
        .btree_map(".")
        .build_transport(false)
        .emit_rerun_if_changed(false)
        .compile_fds(set.clone())?;
    let mut files = Vec::new();
    for name in ["nkv.v1.rs", "kv.rs"] {
        files.push((format!("nkv-grpc/src/generated/{name}"), fs::read(out.path().join(name))?));
    }
    files.push(("nkv-grpc/src/generated/descriptors.bin".into(), without_comments(set).encode_to_vec()));
    Ok(files)
}

fn compile() -> Result<FileDescriptorSet, AnyError> {
    let mut compiler = protox::Compiler::new([here("nkv-grpc/proto")])?;
    compiler.include_source_info(true);
    compiler.open_files(PROTOS)?;
    Ok(compiler.file_descriptor_set())
}

/// What reflection serves.
fn without_comments(mut set: FileDescriptorSet) -> FileDescriptorSet {
    set.file.iter_mut().for_each(|file| file.source_code_info = None);
    set
}

/// What has to stay as it is for programs that were built with an earlier version: names, numbers, types. Given `--published`,
/// the program prints it: for `published.txt`, when something was added.
fn summary(set: &FileDescriptorSet) -> Result<String, AnyError> {
    let mut out = String::new();
    for file in &set.file {
        let package = file.package();
        for service in &file.service {
            for method in &service.method {
                let stream = if method.server_streaming() { "stream " } else { "" };
                let taken = if method.client_streaming() { "stream " } else { "" };
                let (input, output) = (method.input_type(), method.output_type());
                writeln!(out, "/{package}.{}/{}({taken}{input}) -> {stream}{output}", service.name(), method.name())?;
            }
        }
        for message in &file.message_type {
            message_lines(package, message, &mut out)?;
        }
        for values in &file.enum_type {
            enum_lines(package, values, &mut out)?;
        }
    }
    Ok(out)
}

fn message_lines(scope: &str, message: &DescriptorProto, out: &mut String) -> Result<(), AnyError> {
    let name = format!("{scope}.{}", message.name());
    for field in &message.field {
        writeln!(out, "{name} {} {} {}", field.number(), field.name(), type_of(field))?;
    }
    for nested in &message.nested_type {
        message_lines(&name, nested, out)?;
    }
    for values in &message.enum_type {
        enum_lines(&name, values, out)?;
    }
    Ok(())
}

fn enum_lines(scope: &str, values: &EnumDescriptorProto, out: &mut String) -> Result<(), AnyError> {
    for value in &values.value {
        writeln!(out, "{scope}.{} {} {}", values.name(), value.number(), value.name())?;
    }
    Ok(())
}

fn type_of(field: &FieldDescriptorProto) -> String {
    let name = match field.r#type() {
        Type::Message | Type::Enum => field.type_name().to_owned(),
        scalar => scalar.as_str_name().trim_start_matches("TYPE_").to_lowercase(),
    };
    match (field.label(), field.proto3_optional(), field.oneof_index) {
        (Label::Repeated, ..) => format!("repeated {name}"),
        (_, true, _) => format!("optional {name}"),
        (_, _, Some(_)) => format!("oneof {name}"),
        _ => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_the_repository_is_what_the_proto_files_give() {
        for (path, contents) in generate().unwrap() {
            let found = fs::read(here(&path)).unwrap_or_default();
            assert!(found == contents, "{path} is stale: cargo run -p xtask-proto");
        }
    }

    /// Numbers and types that were published stay as they are; what is added is added to the file too.
    #[test]
    fn the_published_messages_stay_as_they_are() {
        let (now, published) = (summary(&compile().unwrap()).unwrap(), include_str!("../published.txt"));
        for line in published.lines() {
            assert!(now.lines().any(|found| found == line), "published, and not there any more: {line}");
        }
        for line in now.lines() {
            assert!(published.lines().any(|found| found == line), "not in xtask-proto/published.txt yet: {line}");
        }
    }

    /// As buf has it, where it fits: a comment for everything, names in their usual form, one zero for each enumeration.
    #[test]
    fn the_files_are_documented_and_named_as_usual() {
        let set = compile().unwrap();
        for file in &set.file {
            let commented: Vec<&[i32]> = file
                .source_code_info
                .iter()
                .flat_map(|info| &info.location)
                .filter(|location| !location.leading_comments().is_empty())
                .map(|location| &location.path[..])
                .collect();
            let check = |path: &[i32], name: &str| assert!(commented.contains(&path), "no comment: {name}");
            for (at, message) in (0..).zip(&file.message_type) {
                check(&[4, at], message.name());
                for (field_at, field) in (0..).zip(&message.field) {
                    check(&[4, at, 2, field_at], field.name());
                    let is_snake = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
                    assert!(field.name().chars().all(is_snake), "{}", field.name());
                }
            }
            for (at, service) in (0..).zip(&file.service) {
                check(&[6, at], service.name());
                for (method_at, method) in (0..).zip(&service.method) {
                    check(&[6, at, 2, method_at], method.name());
                    if file.package() == "nkv.v1" {
                        assert_eq!(method.input_type(), format!(".nkv.v1.{}Request", method.name()));
                        assert_eq!(method.output_type(), format!(".nkv.v1.{}Response", method.name()));
                    }
                }
            }
            for (at, values) in (0..).zip(&file.enum_type) {
                check(&[5, at], values.name());
                assert!(values.value[0].name().ends_with("_UNSPECIFIED") && values.value[0].number() == 0);
            }
        }
    }
}
