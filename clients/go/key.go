package nkv

import (
	"fmt"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

// keyLenMax is the longest key or pattern, in bytes.
const keyLenMax = 1024

// checkKey says what is wrong with a key.
//
// A key that is not UTF-8 is refused here: a JSON encoder would replace its bytes, and two keys would become one.
func checkKey(key string) error {
	return checkSegments(key, key)
}

func checkSegments(text, whole string) error {
	bad := func(at int, what string) error {
		what = fmt.Sprintf("%s at byte %d: a key is segments joined by single dots, such as a.b.c", what, at)
		return invalidKey(whole, what)
	}
	if text == "" {
		return invalidKey(whole, "it is empty")
	}
	if len(whole) > keyLenMax {
		return invalidKey(whole, fmt.Sprintf("it has %d bytes, and at most %d are allowed", len(whole), keyLenMax))
	}
	isStart := true // of a segment
	for at, char := range text {
		if char == utf8.RuneError {
			if _, size := utf8.DecodeRuneInString(text[at:]); size == 1 {
				return bad(at, "what is not UTF-8")
			}
		}
		switch {
		case char == '.' && isStart:
			return bad(at, "empty segment")
		case char == '*':
			return bad(at, "'*' (a wildcard is '*' alone or the last segment of a pattern)")
		case unicode.IsSpace(char):
			return bad(at, "white space")
		case unicode.IsControl(char):
			return bad(at, "a control character")
		}
		isStart = char == '.'
	}
	if isStart {
		return bad(len(text), "empty segment")
	}
	return nil
}

func invalidKey(key, what string) error {
	const shownMax = 64
	if len(key) > shownMax {
		key = key[:shownMax]
	}
	return &Error{Kind: ErrInvalidKey, Key: key, Message: fmt.Sprintf("invalid key %q: %s", key, what)}
}

// checkPattern says what is wrong with a pattern: a key, a key with ".*" behind it, or "*".
func checkPattern(text string) error {
	if text == "*" {
		return nil
	}
	branch, _ := strings.CutSuffix(text, ".*")
	return checkSegments(branch, text)
}

// isWildcard tells a pattern with a wildcard from a key. Both were checked.
func isWildcard(pattern string) bool {
	return strings.HasSuffix(pattern, "*")
}

// covers says whether a subscription to the pattern, or to its key alone, is notified of changes of the key.
func covers(pattern string, exact bool, key string) bool {
	switch {
	case exact:
		return key == pattern
	case pattern == "*":
		return true
	case isWildcard(pattern):
		return strings.HasPrefix(key, pattern[:len(pattern)-1])
	}
	return key == pattern || (len(key) > len(pattern) && key[len(pattern)] == '.' && strings.HasPrefix(key, pattern))
}

// disjoint returns the patterns that no other includes, in their order, so that no key is covered twice.
func disjoint(patterns []string, exact bool) []string {
	var kept []string
	for _, pattern := range patterns {
		// What a pattern covers of another's text, it covers of all that the other does.
		includes := func(other string) bool { return covers(other, exact, pattern) }
		if !slices.ContainsFunc(kept, includes) {
			kept = slices.DeleteFunc(kept, func(other string) bool { return covers(pattern, exact, other) })
			kept = append(kept, pattern)
		}
	}
	return kept
}

// selects says whether a read of the pattern finds the key.
func selects(pattern, key string) bool {
	return covers(pattern, !isWildcard(pattern), key)
}

// keyLess is the order of keys: by segments, each by its bytes.
func keyLess(a, b string) bool {
	n := min(len(a), len(b))
	for i := 0; i < n; i++ {
		if a[i] == b[i] {
			continue
		}
		return b[i] != '.' && (a[i] == '.' || a[i] < b[i])
	}
	return len(a) < len(b)
}
