//! The sources of a crate, and which of its modules each one names.

use proc_macro2::{Delimiter, TokenStream, TokenTree};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// A module: the names that lead to it from the crate's root.
pub(super) type Module = Vec<String>;

/// The packages that count as packages of ours begin so in code.
const OURS: &str = "transhume_";

/// What a file names outside of tests.
#[derive(Debug, Default)]
pub(super) struct Named {
    /// Modules of its crate.
    pub(super) modules: BTreeSet<Module>,
    /// Paths in other crates of ours, from the crate's name on.
    pub(super) elsewhere: BTreeSet<Vec<String>>,
}

/// All sources below a folder but those that only tests have, by their modules.
pub(super) fn of(src: &Path) -> BTreeMap<Module, Named> {
    let mut files = BTreeMap::new();
    collect(src, &mut Vec::new(), &mut files);
    let all: BTreeSet<Module> = files.keys().cloned().collect();
    files
        .iter()
        .map(|(module, path)| {
            let text = fs::read_to_string(path).unwrap();
            let tokens: TokenStream = text.parse().unwrap();
            let mut reader = Reader {
                file: module,
                modules: &all,
                named: Named::default(),
            };
            reader.read(tokens, module);
            (module.clone(), reader.named)
        })
        .collect()
}

fn collect(folder: &Path, module: &mut Module, files: &mut BTreeMap<Module, PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        if path.is_dir() {
            module.push(name);
            collect(&path, module, files);
            module.pop();
        } else if path.extension().is_some_and(|end| end == "rs") {
            let is_test = ["tests", "models"]
                .iter()
                .any(|kind| name == *kind || name.ends_with(&format!("_{kind}")));
            let mut this = module.clone();
            if !matches!(name.as_str(), "mod" | "lib" | "main") {
                this.push(name);
            }
            if !is_test {
                files.insert(this, path);
            }
        }
    }
}

struct Reader<'a> {
    file: &'a Module,
    modules: &'a BTreeSet<Module>,
    named: Named,
}

impl Reader<'_> {
    /// Reads what stands in a module.
    fn read(&mut self, tokens: TokenStream, module: &Module) {
        let tokens: Vec<TokenTree> = tokens.into_iter().collect();
        let mut at = 0;
        while at < tokens.len() {
            if is_test_attribute(&tokens[at..]) {
                at = end_of_item(&tokens, at);
                continue;
            }
            match &tokens[at] {
                TokenTree::Group(group) => {
                    let mut inside = module.clone();
                    if let Some(name) = module_name(&tokens[..at]) {
                        inside.push(name);
                    }
                    self.read(group.stream(), &inside);
                }
                TokenTree::Ident(word) => {
                    let word = word.to_string();
                    let follows_a_path = tokens[..at]
                        .iter()
                        .rev()
                        .take(2)
                        .filter(|one| is_colon(one))
                        .count()
                        == 2;
                    let begins =
                        matches!(word.as_str(), "crate" | "super") || word.starts_with(OURS);
                    if begins && !follows_a_path {
                        self.path(&tokens[at..], Vec::new(), module);
                    }
                }
                _ => {}
            }
            at += 1;
        }
    }

    /// Takes a path or a tree of paths; `before` is what leads to it.
    fn path(&mut self, tokens: &[TokenTree], mut before: Vec<String>, module: &Module) {
        let mut tokens = tokens.iter().peekable();
        while let Some(token) = tokens.next() {
            match token {
                TokenTree::Ident(word) => before.push(word.to_string()),
                TokenTree::Group(group) if group.delimiter() == Delimiter::Brace => {
                    let inside: Vec<TokenTree> = group.stream().into_iter().collect();
                    for branch in inside.split(is_comma) {
                        self.path(branch, before.clone(), module);
                    }
                    return;
                }
                _ => break,
            }
            let is_path = tokens.next_if(|next| is_colon(next)).is_some()
                && tokens.next_if(|next| is_colon(next)).is_some();
            if !is_path {
                break;
            }
        }
        self.take(before, module);
    }

    fn take(&mut self, path: Vec<String>, module: &Module) {
        let Some(first) = path.first() else {
            return;
        };
        if first.starts_with(OURS) {
            self.named.elsewhere.insert(path);
            return;
        }
        let mut whole = if first == "crate" {
            Vec::new()
        } else {
            module.clone()
        };
        for word in path {
            match word.as_str() {
                "super" => drop(whole.pop()),
                "crate" | "self" => {}
                _ => whole.push(word),
            }
        }
        // What follows a module's name is an item of it.
        while !whole.is_empty() && !self.modules.contains(&whole) {
            whole.pop();
        }
        if !whole.is_empty() && whole != *self.file {
            self.named.modules.insert(whole);
        }
    }
}

fn is_colon(token: &TokenTree) -> bool {
    matches!(token, TokenTree::Punct(sign) if sign.as_char() == ':')
}

fn is_comma(token: &TokenTree) -> bool {
    matches!(token, TokenTree::Punct(sign) if sign.as_char() == ',')
}

/// Whether `#[cfg(test)]` begins here.
fn is_test_attribute(tokens: &[TokenTree]) -> bool {
    let [TokenTree::Punct(sign), TokenTree::Group(group), ..] = tokens else {
        return false;
    };
    sign.as_char() == '#' && group.stream().to_string().replace(' ', "") == "cfg(test)"
}

/// Where the item ends that an attribute at `at` stands before.
fn end_of_item(tokens: &[TokenTree], at: usize) -> usize {
    let ends = |token: &TokenTree| match token {
        TokenTree::Punct(sign) => matches!(sign.as_char(), ';' | ','),
        TokenTree::Group(group) => group.delimiter() == Delimiter::Brace,
        _ => false,
    };
    let length = tokens[at..].iter().position(ends);
    length.map_or(tokens.len(), |length| at + length + 1)
}

/// The name of the module whose braces follow these tokens.
fn module_name(before: &[TokenTree]) -> Option<String> {
    let [.., TokenTree::Ident(word), TokenTree::Ident(name)] = before else {
        return None;
    };
    (word == "mod").then(|| name.to_string())
}

#[test]
fn what_a_file_names_is_found_wherever_it_stands() {
    let module = |path: &str| path.split("::").map(str::to_owned).collect::<Module>();
    let modules = ["a", "a::b", "c", "d", "d::e", "f"].map(module).into();
    let mut reader = Reader {
        file: &module("a::b"),
        modules: &modules,
        named: Named::default(),
    };
    let text = "use super::super::{c::{X, self}, d}; fn f(x: crate::f::X) { select! { crate::d::e::g() => {} } }
        mod inner { use super::super::Y; } #[cfg(test)] mod tests { use crate::never::Z; }
        use transhume_base::names; #[cfg(test)] use transhume_testing::peak; use std::crate_like;";
    reader.read(text.parse().unwrap(), &module("a::b"));
    let found: Vec<Module> = reader.named.modules.into_iter().collect();
    assert_eq!(found, ["a", "c", "d", "d::e", "f"].map(module));
    let elsewhere: Vec<Module> = reader.named.elsewhere.into_iter().collect();
    assert_eq!(elsewhere, [module("transhume_base::names")]);
}
