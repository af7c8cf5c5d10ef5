package config

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"

	"github.com/spf13/pflag"
	"go.yaml.in/yaml/v3"

	"github.com/ftckpt/ftckpt/internal/exitcode"
)

// FileKey is the flag that names the configuration file. It may come from the
// environment but not from the file itself.
const FileKey = "config"

// maxFile bounds what is read of a configuration file, in bytes.
const maxFile = 1 << 20

// EnvName is the environment variable of the setting key.
func EnvName(key string) string {
	return "FTCKPT_" + strings.ToUpper(strings.ReplaceAll(key, "-", "_"))
}

// level orders the sources of a value; a higher one wins.
type level int

const (
	fromDefault level = iota
	fromFile
	fromEnv
	fromFlag
)

// Origins remembers where each value came from, for messages and for settings
// that exclude one another.
type Origins struct {
	fs     *pflag.FlagSet
	levels map[string]level
	file   string
}

// Load fills each flag of fs that the command line left alone, from env and
// then from the file that the config flag names. known says which keys the
// file may have: those of all commands, so that one file can serve several.
// An empty environment variable counts as none.
//
// Errors carry exitcode.Config and name the source and the key.
func Load(fs *pflag.FlagSet, known func(key string) bool, env func(string) (string, bool)) (*Origins, error) {
	o := &Origins{fs: fs, levels: map[string]level{}}
	var err error
	fs.VisitAll(func(f *pflag.Flag) {
		switch {
		case f.Changed:
			o.levels[f.Name] = fromFlag
		case err == nil && f.Name != "help":
			if v, ok := env(EnvName(f.Name)); ok && v != "" {
				if e := fs.Set(f.Name, v); e != nil {
					err = badValue(EnvName(f.Name), e)
				}
				o.levels[f.Name] = fromEnv
			}
		}
	})
	if err != nil {
		return nil, err
	}
	if f := fs.Lookup(FileKey); f != nil && f.Value.String() != "" {
		o.file = f.Value.String()
		if err := o.loadFile(known); err != nil {
			return nil, exitcode.Wrap(exitcode.Config, err)
		}
	}
	return o, nil
}

func (o *Origins) loadFile(known func(string) bool) error {
	settings, err := readFile(o.file)
	if err != nil {
		return fmt.Errorf("read configuration: %w", err)
	}
	for _, s := range settings {
		if s.key == FileKey || s.key == "help" || !known(s.key) {
			return fmt.Errorf("%s: line %d: unknown key %q (keys are the names of the flags)", o.file, s.line, s.key)
		}
		f := o.fs.Lookup(s.key)
		if f == nil || o.levels[s.key] > fromFile {
			continue // another command's, or overridden
		}
		if err := setAll(o.fs, f, s.values); err != nil {
			return badValue(fmt.Sprintf("%s: line %d: %s", o.file, s.line, s.key), err)
		}
		o.levels[s.key] = fromFile
	}
	return nil
}

func setAll(fs *pflag.FlagSet, f *pflag.Flag, values []string) error {
	if _, isList := f.Value.(pflag.SliceValue); !isList && len(values) != 1 {
		return errors.New("takes one value, not a list")
	}
	for _, v := range values {
		if err := fs.Set(f.Name, v); err != nil {
			return err
		}
	}
	return nil
}

// badValue words an error of pflag's Set, which speaks of flags, for another
// source.
func badValue(source string, err error) error {
	if inner, ok := errors.AsType[*pflag.InvalidValueError](err); ok {
		err = fmt.Errorf("invalid value %q: %w", inner.GetValue(), errors.Unwrap(inner))
	}
	return exitcode.Wrap(exitcode.Config, fmt.Errorf("%s: %w", source, err))
}

// setting is one key of a file with its scalar, or the scalars of its list.
type setting struct {
	key    string
	line   int
	values []string
}

func readFile(path string) ([]setting, error) {
	// A pipe or a device could block for ever, a pipe already in open(2).
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil {
		return nil, err
	} else if !fi.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", path)
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxFile {
		return nil, fmt.Errorf("%s is larger than %d bytes", path, maxFile)
	}
	settings, err := parse(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return settings, nil
}

// parse reads a YAML document that is one flat mapping of keys to scalars or
// lists of scalars. It goes through nodes, not into a struct, so that every
// value reaches the flag's own parser as it was written: 10s, 0x10 and on mean
// in a file what they mean on a command line.
func parse(data []byte) ([]setting, error) {
	dec := yaml.NewDecoder(strings.NewReader(string(data)))
	var doc yaml.Node
	switch err := dec.Decode(&doc); {
	case errors.Is(err, io.EOF):
		return nil, nil // empty, or comments alone
	case err != nil:
		return nil, err
	}
	if err := dec.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return nil, errors.New("more than one YAML document")
	}
	root := doc.Content[0]
	if root.Kind == yaml.ScalarNode && root.Tag == "!!null" {
		return nil, nil
	}
	if root.Kind != yaml.MappingNode {
		return nil, fmt.Errorf("line %d: want a mapping of keys to values", root.Line)
	}
	var settings []setting
	seen := map[string]bool{}
	for i := 0; i < len(root.Content); i += 2 {
		k, v := root.Content[i], root.Content[i+1]
		if k.Kind != yaml.ScalarNode {
			return nil, fmt.Errorf("line %d: a key must be a plain word", k.Line)
		}
		if seen[k.Value] {
			return nil, fmt.Errorf("line %d: key %q is given twice", k.Line, k.Value)
		}
		seen[k.Value] = true
		values, err := scalars(v)
		if err != nil {
			return nil, fmt.Errorf("line %d: key %q %w", v.Line, k.Value, err)
		}
		settings = append(settings, setting{key: k.Value, line: k.Line, values: values})
	}
	return settings, nil
}

func scalars(v *yaml.Node) ([]string, error) {
	nodes := []*yaml.Node{v}
	if v.Kind == yaml.SequenceNode {
		nodes = v.Content
	}
	if len(nodes) == 0 {
		return nil, errors.New("has no value")
	}
	values := make([]string, 0, len(nodes))
	for _, n := range nodes {
		switch {
		case n.Kind != yaml.ScalarNode:
			return nil, errors.New("must be a value or a list of values")
		case n.Tag == "!!null":
			return nil, errors.New("has no value")
		}
		values = append(values, n.Value)
	}
	return values, nil
}

// IsSet says whether key got a value from anywhere but its default.
func (o *Origins) IsSet(key string) bool { return o.levels[key] > fromDefault }

// label is how to name key in a message so that the user finds the place.
func (o *Origins) label(key string) string {
	switch o.levels[key] {
	case fromEnv:
		return EnvName(key)
	case fromFile:
		return o.file + ": " + key
	default:
		return "--" + key
	}
}

// Exclusive sees to settings that exclude one another. Two from the same
// source are a mistake of usage (or of configuration); of two from different
// sources the stronger wins and the other goes back to its default, as it
// would for one and the same setting.
func (o *Origins) Exclusive(a, b string) error {
	if !o.IsSet(a) || !o.IsSet(b) {
		return nil
	}
	weaker := a
	switch la, lb := o.levels[a], o.levels[b]; {
	case la == lb:
		code := exitcode.Config
		if la == fromFlag {
			code = exitcode.Usage
		}
		return exitcode.Errorf(code, "%s and %s exclude one another", o.label(a), o.label(b))
	case la > lb:
		weaker = b
	}
	f := o.fs.Lookup(weaker)
	if err := f.Value.Set(f.DefValue); err != nil {
		return fmt.Errorf("reset --%s: %w", weaker, err)
	}
	o.levels[weaker] = fromDefault
	return nil
}

// Require says which of the keys have no value, as a mistake of usage.
func (o *Origins) Require(command string, keys ...string) error {
	var missing []string
	for _, k := range keys {
		if !o.IsSet(k) {
			missing = append(missing, "--"+k)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	return exitcode.Errorf(exitcode.Usage, "%s needs %s", command, strings.Join(missing, ", "))
}

// Explain gives an error of a Validate method its source and its exit status.
func (o *Origins) Explain(err error) error {
	p, ok := errors.AsType[*SettingError](err)
	if !ok {
		return err
	}
	return exitcode.Errorf(exitcode.Config, "%s: %w", o.label(p.Key), p.Err)
}
